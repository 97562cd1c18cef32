"""What a latent means: examples, maps, concepts, explanations, stress tests, names."""

from __future__ import annotations

from biosae.interpret.alignment import alignment, alignment_summary
from biosae.interpret.alignment_controls import compare_alignment, random_codes
from biosae.interpret.attenuation import Attenuation, attenuation
from biosae.interpret.audit import propose_audit
from biosae.interpret.enrichment import enrichment
from biosae.interpret.examples import examples
from biosae.interpret.maps import TokenMap, grid_box, recording_map, token_map
from biosae.interpret.masks import displaced, token_parts
from biosae.interpret.ontology import Ontology, read_obo
from biosae.interpret.precision import average_precision, average_precisions
from biosae.interpret.separability import js_distance, separability
from biosae.interpret.slides import SlideMap, places, slide_map, slide_view, spatial_table, write_geojson
from biosae.interpret.stress import StressCard, stress
from biosae.interpret.vocabulary import concept_scores, name_latents, read_vocabulary

__all__ = [
    "Attenuation",
    "Ontology",
    "SlideMap",
    "StressCard",
    "TokenMap",
    "alignment",
    "alignment_summary",
    "attenuation",
    "average_precision",
    "average_precisions",
    "compare_alignment",
    "concept_scores",
    "displaced",
    "enrichment",
    "examples",
    "grid_box",
    "js_distance",
    "name_latents",
    "places",
    "propose_audit",
    "random_codes",
    "read_obo",
    "read_vocabulary",
    "recording_map",
    "separability",
    "slide_map",
    "slide_view",
    "spatial_table",
    "stress",
    "token_map",
    "token_parts",
    "write_geojson",
]
