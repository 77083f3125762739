"""Judging: tasks under policies and budgets, each number with its standard error.

`tasks` measure, `analysis` looks at attention, `report` shows what was found.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "analysis.agreement": [
            "binned",
            "head_agreement",
            "hit_rate_and_drift",
            "overlap",
            "step_agreement",
            "token_access",
        ],
        "analysis.coloured": ["colour", "coloured_text"],
        "analysis.reading": ["attention_and_scores", "reading_of"],
        "analysis.rows": ["text_batch"],
        "config": ["EvalConfig"],
        "contenders": ["prepared"],
        "evaluator": ["evaluate"],
        "report.report": ["Report", "check_directory"],
        "tasks.coreference": ["coreference_batches"],
        "tasks.harness": ["ButlerLM"],
        "tasks.local_tasks": ["TASKS_DIRECTORY"],
        "tasks.perplexity": ["TextResult", "measure_perplexity", "text_windows"],
        "tasks.retrieval": ["key_value_batches", "needle_batches", "variables_batches"],
        "tasks.teacher_forcing": ["Answers", "answers"],
    },
)
