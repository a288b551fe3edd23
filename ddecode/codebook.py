"""Nearest codes by matrix product.

V codes of width C; any leading shape. B batch, L token positions.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ddecode.arguments import check_ids, shown

ROWS_PER_CHUNK = 16384


def code_vectors(tokens: Tensor, codebook_VC: Tensor) -> Tensor:
    """What a tokenizer decodes.

    Args:
        tokens: ids int64 [B,L], or embeddings float [B,L,C].
        codebook_VC: float [V,C].

    Returns:
        The ids' codes, or the embeddings, fp32 [B,L,C].

    Raises:
        ValueError: they are neither, or an id is no code's.
    """
    if not isinstance(tokens, Tensor) or not tokens.is_floating_point():
        check_ids(tokens, len(codebook_VC))
        return F.embedding(tokens, codebook_VC)
    if tokens.dim() != 3 or tokens.shape[2] != codebook_VC.shape[1]:
        raise ValueError(f"embeddings must be [B, L, {codebook_VC.shape[1]}], got {shown(tokens)}")
    return tokens.float()


def nearest_code(vectors: Tensor, codebook_VC: Tensor) -> Tensor:
    """Index of the code nearest to each vector in Euclidean distance.

    argmin_j |x - c_j|^2 = argmax_j (x . c_j - |c_j|^2 / 2): one matmul, in chunks of rows.

    Args:
        vectors: float [..., C].
        codebook_VC: float [V, C].

    Returns:
        int64 [...].

    Raises:
        ValueError: the widths differ.
    """
    if vectors.shape[-1] != codebook_VC.shape[-1]:
        raise ValueError(f"vectors have width {vectors.shape[-1]}, the codebook has {codebook_VC.shape[-1]}")
    codes = codebook_VC.float()
    rows = vectors.reshape(-1, vectors.shape[-1]).float()
    bias_V = codes.square().sum(-1) / 2
    with torch.autocast(codes.device.type, enabled=False):
        ids = [torch.addmm(-bias_V, chunk, codes.T).argmax(-1) for chunk in rows.split(ROWS_PER_CHUNK)]
    return torch.cat(ids).reshape(vectors.shape[:-1])
