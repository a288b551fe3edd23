"""The bundled models and feature networks: package data, read through `ddecode.checkpoint`."""
