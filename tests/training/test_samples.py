"""What the live model says after a validation, in every kind of layout: what transformers generates."""

import json

from bov_megatron.lifecycle.run_folder import latest_checkpoint
from tests.support.distributed import run_ranks
from tests.support.runs import launch, metrics, overrides, train

PROMPTS = ["def read", "import json\n\nclass Decoder", ""]
COMMON = [
    *("train.steps=4", "validation.interval=2", "model.num_layers=4", "checkpoint.interval=0"),
    *(f"validation.prompts={json.dumps(PROMPTS)}", "validation.prompt_tokens=12"),
]
LAYOUTS = {
    "tp2-cp2": (4, "parallel.tensor_model_parallel_size=2", "parallel.context_parallel_size=2",
                "parallel.sequence_parallel=true"),
    "pp2-interleaved-dp2": (4, "parallel.pipeline_model_parallel_size=2",
                            "parallel.virtual_pipeline_model_parallel_size=2"),
    "zero3": (2, "engine=deepspeed", "optimizer.name=adamw", "deepspeed.zero_stage=3"),
    "gathered-ahead": (2, "parallel.overlap_param_gather=true"),
}  # fmt: skip


def greedy_rank(rank: int, world_size: int, checkpoints: list[str]) -> list[list[str]]:
    """Continuations by transformers' `generate`, without the project's own code around it."""
    from pathlib import Path

    import torch
    from transformers import AutoTokenizer

    from bov_megatron.exchange.convert import in_memory

    found = []
    for checkpoint in map(Path, checkpoints):
        model = in_memory(checkpoint)
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.parent.parent / "tokenizer")
        texts = []
        for prompt in PROMPTS:
            ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(prompt, add_special_tokens=False)]])
            output = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=0, pad_token_id=0)
            texts.append(tokenizer.decode(output[0, ids.size(1) :], skip_special_tokens=True))
        found.append(texts)
    return found


def test_samples_are_what_transformers_generates(prepared_data, tmp_path):
    for name, (world_size, *layout) in LAYOUTS.items():
        said = train(world_size, overrides(prepared_data, tmp_path / name, *COMMON, *layout))
        assert 'step 4: "def read" → ' in said
    lines = {name: metrics(tmp_path / name) for name in LAYOUTS}
    checkpoints = [str(latest_checkpoint(tmp_path / name)) for name in LAYOUTS]
    (expected,) = run_ranks(greedy_rank, 1, checkpoints)
    for name, texts in zip(LAYOUTS, expected, strict=True):
        with_samples = [line["step"] for line in lines[name] if "samples" in line]
        assert with_samples == [2, 4], name
        samples = lines[name][-1]["samples"]
        assert [sample["prompt"] for sample in samples] == PROMPTS
        assert [sample["text"] for sample in samples] == texts, name
    assert len({text for texts in expected for text in texts}) > 2, "all models say the same: nothing was compared"


def test_a_prompt_that_leaves_no_room_is_refused(prepared_data, tmp_path):
    long = json.dumps(["word " * 300])
    results = launch(1, overrides(prepared_data, tmp_path / "run", f"validation.prompts={long}"))
    ((status, text),) = results
    assert status == 2 and "validation.prompts[0] has" in text and "model.sequence_length=256" in text
    assert text.splitlines()[-1].startswith("error: ")


def test_samples_are_part_of_a_resumed_run(prepared_data, tmp_path):
    """Cut short after step 3 of 4 and continued: the same lines as without the interruption."""
    whole = overrides(prepared_data, tmp_path / "whole", *COMMON)
    cut = overrides(prepared_data, tmp_path / "cut", *COMMON, "checkpoint.interval=3")
    train(1, whole)
    assert [status for status, _ in launch(1, [*cut, "train.max_minutes=0.0001"])] == [143]
    train(1, cut)
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
