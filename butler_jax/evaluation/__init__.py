"""Evaluation: tasks under policies and budgets, each number with its standard error.

`tasks` measure, `analysis` shows how attention behaves, `report` shows the results.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "analysis.agreement": [
            "measure_access",
            "measure_drift",
            "measure_head_agreement",
            "measure_overlap",
            "measure_step_agreement",
        ],
        "analysis.coloured_text": ["colour_tokens"],
        "analysis.errors": ["measure_errors"],
        "analysis.reading": ["compare_attention", "find_reading"],
        "analysis.rows": ["batch_text"],
        "config": ["EvalConfig"],
        "contenders": ["prepare_policies"],
        "evaluator": ["evaluate"],
        "plots": ["make_canvas"],
        "report.report": ["Report", "check_directory"],
        "tasks.answers": ["Answers", "count_answers"],
        "tasks.coreference": ["make_coreference_batches"],
        "tasks.harness": ["ButlerLM"],
        "tasks.local_tasks": ["TASKS_DIRECTORY"],
        "tasks.passes": ["Passes"],
        "tasks.perplexity": ["TextSums", "measure_perplexity"],
        "tasks.retrieval": ["SampleGrid", "make_key_value_batches", "make_needle_batches", "make_variables_batches"],
    },
)
