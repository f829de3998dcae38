"""The exported model in the evaluation harness of the field, lm_eval."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import small_config, train
from test_export import export, loaded

TASK = """
task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""

EVALUATE = """
import json, sys
import lm_eval
from lm_eval.tasks import TaskManager
found = lm_eval.simple_evaluate(
    model="hf",
    model_args=f"pretrained={sys.argv[1]},dtype=float32{sys.argv[3]}",
    tasks=["tiny"],
    task_manager=TaskManager(include_path=sys.argv[2], include_defaults=False),
    device="cpu",
    batch_size=2,
    bootstrap_iters=0,
)
samples = sorted(found["samples"]["tiny"], key=lambda sample: sample["doc_id"])
scores = [[response[0][0] for response in sample["resps"]] for sample in samples]
print(json.dumps({"acc": found["results"]["tiny"]["acc,none"], "scores": scores}))
"""

QUESTIONS: list[dict[str, Any]] = [
    {"question": "the quick", "choices": [" one", " of the"], "label": 1},
    {"question": "a b", "choices": [" c", "zz"], "label": 0},
    {"question": "def f", "choices": ["(x)", " <|endoftext|>"], "label": 0},
]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("crossing", [False, True])
def test_its_scores_are_ours(corpus: Path, tmp_path: Path, crossing: bool) -> None:
    changes = {"model__name": "llama", "model__layer_crossing": str(crossing).lower()}
    train(small_config(corpus, run__dir=tmp_path / "run", checkpoint__interval=30, **changes))
    out = export(tmp_path / "run", tmp_path / "out")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (tasks / "tiny.yaml").write_text(TASK.format(file=tasks / "data.jsonl"))
    environment = os.environ | {
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, "-c", EVALUATE, str(out), str(tasks), ",trust_remote_code=True" if crossing else ""]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    trained = loaded(tmp_path / "run")
    right = 0
    for row, scores in zip(QUESTIONS, found["scores"], strict=True):
        expected = []
        for choice in row["choices"]:
            context = trained.tokenizer.encode(row["question"])
            ids = torch.tensor([trained.tokenizer.encode(row["question"] + choice)])
            with torch.no_grad():
                logs = trained.model(ids[:, :-1]).log_softmax(-1)[0].gather(-1, ids[0, 1:, None])
            expected.append(float(logs[len(context) - 1 :].sum()))
        assert scores == pytest.approx(expected, abs=1e-4)
        right += max(range(2), key=expected.__getitem__) == row["label"]
    assert found["acc"] == pytest.approx(right / len(QUESTIONS))
