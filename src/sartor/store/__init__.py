"""Model store: catalogue, sources, downloads, integrity, garbage collection."""

from __future__ import annotations

from sartor.store.catalogue import Catalogue, CatalogueEntry, Source, default_catalogue, parse_ref
from sartor.store.manifest import StoredModel
from sartor.store.progress import Progress, Silent
from sartor.store.reference import ModelRef
from sartor.store.source import SourceError
from sartor.store.store import Description, ModelStore, sartor_home

__all__ = [
    "Catalogue",
    "CatalogueEntry",
    "Description",
    "ModelRef",
    "ModelStore",
    "Progress",
    "Silent",
    "Source",
    "SourceError",
    "StoredModel",
    "default_catalogue",
    "parse_ref",
    "sartor_home",
]
