"""All metrics by the names that benchmarks use. Pure functions; no torch, no files."""

from __future__ import annotations

from geochat.eval import published_boxes, rsevalkit
from geochat.eval.boxes import judge_boxes, judge_permille, summarise_boxes, truth_polygons
from geochat.eval.captions import judge_caption, judge_description, summarise_captions, summarise_descriptions
from geochat.eval.evalai import judge_vqa, summarise_vqa
from geochat.eval.footprints import judge_footprint, summarise_footprints
from geochat.eval.labels import (
    bare,
    judge_exact,
    judge_labels,
    judge_word,
    labels_in,
    split_labels,
    summarise_labels,
)
from geochat.eval.options import (
    judge_circular,
    judge_llava_option,
    judge_llava_yes_no,
    judge_option,
    judge_refusal,
    judge_xtuner,
    judge_yes_no,
    summarise_circular,
    summarise_yes_no,
)
from geochat.eval.quantities import judge_count, judge_measures, summarise_errors
from geochat.eval.verdicts import (
    IOU_MODES,
    Metric,
    Question,
    Summary,
    judge_nothing,
    summarise_accuracy,
    summarise_nothing,
)

__all__ = ["IOU_MODES", "MATCHES", "METRICS", "Question", "Summary", "bare", "labels_in", "truth_polygons"]

METRICS: dict[str, Metric] = {
    "exact_match": Metric(judge_exact, summarise_accuracy, "accuracy"),
    "class_word": Metric(judge_word, summarise_accuracy, "accuracy"),
    "labels": Metric(judge_labels, summarise_labels, "class_f1", labels_of=split_labels),
    "count": Metric(judge_count, summarise_errors, "accuracy"),
    "measures": Metric(judge_measures, summarise_errors, "mean_relative_error"),
    "boxes": Metric(judge_boxes, summarise_boxes, "recall@0.5"),
    "boxes_permille": Metric(judge_permille, summarise_boxes, "recall@0.5"),
    "footprint": Metric(judge_footprint, summarise_footprints, "c_iou"),
    "caption": Metric(judge_caption, summarise_captions, "rougeL"),
    "description": Metric(judge_description, summarise_descriptions, "meteor"),
    "option": Metric(judge_option, summarise_accuracy, "accuracy"),
    "circular": Metric(judge_circular, summarise_circular, "circular_accuracy"),
    "xtuner_circular": Metric(judge_xtuner, summarise_circular, "circular_accuracy"),
    "yes_no": Metric(judge_yes_no, summarise_yes_no, "accuracy"),
    "llava_option": Metric(judge_llava_option, summarise_accuracy, "accuracy"),
    "llava_yes_no": Metric(judge_llava_yes_no, summarise_yes_no, "accuracy"),
    "refusal": Metric(judge_refusal, summarise_accuracy, "accuracy"),
    "vqa": Metric(judge_vqa, summarise_vqa, "vqa_accuracy"),
    "none": Metric(judge_nothing, summarise_nothing, "answered", needs_truth=False),
    **published_boxes.METRICS,
    **rsevalkit.METRICS,
}

MATCHES = {"earthdial": "boxes_earthdial", "vrsbench": "boxes_vrsbench"}
"""Other ways to match boxes, by the program that published them."""
