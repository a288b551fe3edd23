"""A report that opens without a network: one HTML file, pictures inside."""

import base64
import html
from dataclasses import dataclass, field

from PIL import Image

from ddecode.images import png

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1b1b1f; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; margin: .8rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
figure { display: inline-block; margin: .4rem .8rem .4rem 0; } figcaption { font-size: .9rem; color: #555; }
img { image-rendering: pixelated; display: block; } code { background: #f2f2f4; padding: .1rem .3rem; }
@media (prefers-color-scheme: dark) { body { background: #16161a; color: #e4e4e8; } code { background: #2a2a30; }
  th, td { border-color: #3a3a42; } figcaption { color: #aaa; } }
"""


@dataclass(kw_only=True)
class Report:
    """Collects sections in reading order; `html` gives the file's text."""

    title: str
    parts: list[str] = field(default_factory=list)

    def heading(self, text: str) -> None:
        self.parts.append(f"<h2>{html.escape(text)}</h2>")

    def paragraph(self, text: str) -> None:
        self.parts.append(f"<p>{html.escape(text)}</p>")

    def table(self, header: list[str], rows: list[list[str]]) -> None:
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        self.parts.append(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")

    def pictures(self, captioned: dict[str, Image.Image]) -> None:
        for caption, picture in captioned.items():
            data = base64.b64encode(png(picture)).decode()
            self.parts.append(
                f'<figure><img src="data:image/png;base64,{data}" alt="{html.escape(caption)}">'
                f"<figcaption>{html.escape(caption)}</figcaption></figure>"
            )

    def html(self) -> str:
        title = html.escape(self.title)
        return (
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
            f"<body><h1>{title}</h1>{''.join(self.parts)}</body></html>\n"
        )
