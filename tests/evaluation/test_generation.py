"""`bov generate`: on a checkpoint it says what transformers says on its export; streamed text is the whole text."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bov_megatron.commands import main
from bov_megatron.errors import EvaluationError
from bov_megatron.evaluation.generation import Generator, Sampling
from tests.support.distributed import run_ranks

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ["def read", "class", "é"]


def said_rank(rank: int, world_size: int, target: str, options: dict, sampling: dict) -> list:
    """Texts and pieces of every prompt, by the project's code in a process of its own."""
    generator = Generator(Path(target), **options)
    found = []
    for prompt in PROMPTS:
        pieces: list[str] = []
        found.append((generator.generate(prompt, 40, Sampling(**sampling), pieces.append), pieces))
    return found


def test_a_checkpoint_says_what_transformers_says_on_its_export(trained_run, trained_export):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (found,) = run_ranks(said_rank, 1, str(trained_run), {}, {})
    model = AutoModelForCausalLM.from_pretrained(trained_export, trust_remote_code=True, dtype="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(trained_export)
    assert model.dtype == torch.bfloat16
    for prompt, (generation, pieces) in zip(PROMPTS, found, strict=True):
        inputs = tokenizer(tokenizer.bos_token + prompt, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0, inputs["input_ids"].size(1) :]
        assert generation.text == tokenizer.decode(output, skip_special_tokens=True)
        assert generation.tokens == len(output)
        assert "".join(pieces) == generation.text
    assert any(len(pieces) > 5 for _, pieces in found), "the text came at once"
    (of_export,) = run_ranks(said_rank, 1, str(trained_export), {}, {})
    assert [generation.text for generation, _ in of_export] == [generation.text for generation, _ in found]


def test_an_earlier_step_is_another_model(trained_run):
    (newest,) = run_ranks(said_rank, 1, str(trained_run), {"dtype": "float32"}, {})
    (earlier,) = run_ranks(said_rank, 1, str(trained_run), {"step": 10, "dtype": "float32"}, {})
    (by_folder,) = run_ranks(said_rank, 1, str(trained_run / "checkpoints/step_00000010"), {"dtype": "float32"}, {})
    texts = [[generation.text for generation, _ in found] for found in (newest, earlier, by_folder)]
    assert texts[1] == texts[2] != texts[0]


def test_sampling(trained_export):
    generator = Generator(trained_export, dtype="float32")  # in bf16 several tokens can have the highest logit

    def say(**sampling) -> str:
        return generator.generate("def", 30, Sampling(**sampling)).text

    assert say(temperature=1.0, seed=1) == say(temperature=1.0, seed=1) != say(temperature=1.0, seed=2)
    assert say(temperature=1.0, top_k=1, seed=3) == say(temperature=5.0, top_p=1e-6, seed=4) == say()


def test_tables_outside_the_device_give_the_same_text(trained_run, trained_export):
    expected = Generator(trained_export).generate("def", 12).text
    for target, bank_device in ((trained_export, "mmap"), (trained_run, "cpu")):
        generator = Generator(target, bank_device=bank_device)
        assert generator.model.tables() and generator.generate("def", 12).text == expected
    with pytest.raises(EvaluationError, match="is a checkpoint, and only an export's tables can be mapped"):
        Generator(trained_run, bank_device="mmap")


def test_what_means_nothing_is_refused(trained_export, prepared_data):
    generator = Generator(trained_export)
    with pytest.raises(EvaluationError, match="the prompt has .* the model was trained on 256: shorten it"):
        generator.generate("x y " * 300)
    full = generator.generate("def " * 60, 500)
    assert full.tokens <= prepared_data.sequence_length - 60
    for options, message in (
        ({"top_k": 5}, "give --temperature as well"),
        ({"temperature": -1.0}, "--temperature -1.0: must be 0"),
        ({"temperature": 1.0, "top_p": 0.0}, "--top-p 0.0: must be above 0"),
    ):
        with pytest.raises(EvaluationError, match=message):
            Sampling(**options)


def test_text_that_spells_the_special_token_is_text(trained_export):
    ids = Generator(trained_export).encoder.encode(["<|bos|>"])[0]
    assert 0 not in ids


def test_the_command_reads_its_input_and_prints_what_it_says(trained_run, trained_export, tmp_path, capfd):
    command = [sys.executable, ROOT / "tools/generate.py", trained_run, "--max-new-tokens", "20"]
    done = subprocess.run(command, input="def read\n", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 1 and "step_00000020: " in done.stderr and "tokens/s, ended by" in done.stderr
    prompts = ["--prompt", "def read", "--prompt", "class", "--max-new-tokens", "20", "--json"]
    assert main(["generate", str(trained_export), *prompts]) == 0
    first, second = map(json.loads, capfd.readouterr().out.splitlines())
    assert done.stdout == f"def read{first['text']}\n"
    assert second["prompt"] == "class" and second["tokens"] <= 20
    assert main(["generate", str(tmp_path), "--prompt", "x"]) == 2
    said = capfd.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
