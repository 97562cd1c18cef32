"""What a latent means: examples, maps, concepts, explanations, stress tests, names."""

from __future__ import annotations

from biosae.interpret import explain
from biosae.interpret.alignment import alignment, alignment_summary
from biosae.interpret.alignment_controls import compare_alignment, random_codes
from biosae.interpret.altered import altered
from biosae.interpret.attenuation import Attenuation, attenuation
from biosae.interpret.attribution import head_attribution, layer_attribution, reading_direction
from biosae.interpret.audit import propose_audit
from biosae.interpret.enrichment import enrichment
from biosae.interpret.examples import examples
from biosae.interpret.maps import TokenMap, grid_box, recording_map, token_map
from biosae.interpret.masks import displaced, token_parts
from biosae.interpret.names import dictionary_fingerprint, read_names, write_names
from biosae.interpret.ontology import Ontology, read_obo
from biosae.interpret.overlays import spatial_table, write_geojson
from biosae.interpret.separability import js_distance, separability
from biosae.interpret.slides import SlideMap, places, slide_map, slide_view
from biosae.interpret.specific import Ablation, ablate_directions, project_out, specific
from biosae.interpret.stress import StressCard, stress
from biosae.interpret.vocabulary import concept_scores, name_latents, read_vocabulary
from biosae.stats.precision import average_precision, average_precisions

__all__ = [
    "Ablation",
    "Attenuation",
    "Ontology",
    "SlideMap",
    "StressCard",
    "TokenMap",
    "ablate_directions",
    "alignment",
    "alignment_summary",
    "altered",
    "attenuation",
    "average_precision",
    "average_precisions",
    "compare_alignment",
    "concept_scores",
    "dictionary_fingerprint",
    "displaced",
    "enrichment",
    "examples",
    "explain",
    "grid_box",
    "head_attribution",
    "js_distance",
    "layer_attribution",
    "name_latents",
    "places",
    "project_out",
    "propose_audit",
    "random_codes",
    "read_names",
    "read_obo",
    "read_vocabulary",
    "reading_direction",
    "recording_map",
    "separability",
    "slide_map",
    "slide_view",
    "spatial_table",
    "specific",
    "stress",
    "token_map",
    "token_parts",
    "write_geojson",
    "write_names",
]
