"""What `bov inspect_run` says of a run, against plain computations with its weights."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from bov_megatron.errors import DataError, EvaluationError, RunFolderError
from bov_megatron.lifecycle.run_folder import checkpoint_path, latest_checkpoint
from tests.support.distributed import run_ranks
from tests.support.runs import metrics, overrides, train

STEPS = 6
COMMON = ["train.steps=6", "validation.interval=0", "checkpoint.interval=0", "validation.tokens=512"]
BANK = [*COMMON, "model.value.target_layers=[1, 2]", "health.on_spike=rollback"]  # which keeps the initial weights
TP2 = ["parallel.tensor_model_parallel_size=2", "model.value.table_partition=head"]


@pytest.fixture(scope="module")
def bank_run(prepared_data, tmp_path_factory) -> Path:
    """Of two tensor-parallel ranks with half of each row."""
    run = tmp_path_factory.mktemp("inspected") / "bank"
    train(2, overrides(prepared_data, run, *BANK, *TP2))
    return run


@pytest.fixture(scope="module")
def baseline_run(prepared_data, bank_run) -> Path:
    run = bank_run.parent / "baseline"
    train(1, overrides(prepared_data, run, *COMMON, "model.value.source=projection"))
    return run


def weights_rank(rank: int, world_size: int, checkpoints: list[Path]) -> list[dict[str, np.ndarray]]:
    """By canonical name, through Megatron's loading."""
    from bov_megatron.exchange.convert import in_memory

    return [
        {name: tensor.numpy() for name, tensor in in_memory(path, torch.float32).state_dict().items()}
        for path in checkpoints
    ]


@pytest.fixture(scope="module")
def weights(bank_run) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """At the end and at the start."""
    ((end, start),) = run_ranks(weights_rank, 1, [checkpoint_path(bank_run, STEPS), checkpoint_path(bank_run, 0)])
    return end, start


def inspect_rank(rank: int, world_size: int, run: Path, other: Path | None, options: dict):
    from bov_megatron.inspection.findings import Options, inspect

    return inspect(run, other, Options(**options))


@pytest.fixture(scope="module")
def found(bank_run, baseline_run):
    options = dict(count_tokens=10**9, samples=3, batch_size=2, tokens=["self", " def", " return"])
    (result,) = run_ranks(inspect_rank, 1, bank_run, baseline_run, options)
    return result


def test_rows_are_compared_with_where_they_began(found, weights):
    end, start = weights
    assert [(table.layer, table.label) for table in found.tables] == [(1, "layer 1"), (2, "layer 2")]
    for table in found.tables:
        now, before = end[table.name].astype(np.float64), start[table.name].astype(np.float64)
        assert table.norms == pytest.approx(np.linalg.norm(now, axis=1), rel=1e-5)
        lengths = np.linalg.norm(before, axis=1)
        assert table.distances == pytest.approx(np.linalg.norm(now - before, axis=1) / lengths, rel=1e-3, abs=1e-6)
        assert table.distance == pytest.approx(np.linalg.norm(now - before) / np.linalg.norm(before), rel=1e-4)
        assert table.cosine == pytest.approx((now * before).sum() / np.linalg.norm(now) / np.linalg.norm(before))
        assert table.distance > 0.01


def test_rows_never_updated_are_those_whose_token_never_came(found, prepared_data):
    from bov_megatron.data.loader import TrainLoader
    from bov_megatron.recipe import DataConfig

    data = DataConfig(path=str(prepared_data.folder), shuffle_block_size=128)
    sizes = dict(sequence_length=256, vocab_size=512, global_batch_size=4, micro_batch_size=4)
    came = np.zeros(512, dtype=bool)
    with TrainLoader(data, **sizes) as loader:
        next(loader)  # attention's output matrices are zero at first, so the first step has no gradient for a table
        for _ in range(1, STEPS):
            came[next(loader).micro_batches[0][:, :-1].numpy()] = True
    assert 0.02 < came.mean() < 0.98, "nothing is tested where all came"
    for table in found.tables:
        assert (table.untouched == ~came).all()


def test_tokens_are_counted(found, prepared_data):
    from bov_megatron.data.shards import DataSet

    split = DataSet(prepared_data.folder).split("train")
    inputs = split.read(np.arange(split.num_samples))[:, :-1]
    assert (found.frequencies.counts == np.bincount(inputs.ravel(), minlength=512)).all()
    bins, edges = found.frequencies.bins(), found.frequencies.edges()
    seen = found.frequencies.counts > 0
    assert (bins[~seen] == -1).all() and bins[seen].min() >= 0 and bins[seen].max() < len(edges) - 1


def test_neighbours_are_the_nearest(found, weights, prepared_data):
    from bov_megatron.data.tokenizer import load_encoder
    from bov_megatron.inspection.findings import token_text

    encoder, table = load_encoder(prepared_data.tokenizer), found.tables[-1]
    allowed = (found.frequencies.counts > 0) & ~table.untouched
    assert found.neighbours_of == "layer 2" and [near.text for near in found.nearest] == ["self", "␣def", "␣return"]
    for near, text in zip(found.nearest, ["self", " def", " return"], strict=True):
        (token,) = encoder.encode([text])[0].tolist()
        for shown, name in ((near.values, table.name), (near.embedding, "model.embed_tokens.weight")):
            rows = weights[0][name].astype(np.float64)
            cosines = rows @ rows[token] / np.linalg.norm(rows, axis=1) / np.linalg.norm(rows[token])
            cosines[~allowed] = cosines[token] = -2
            best = np.argsort(-cosines)[: len(shown)]
            assert [text for text, _ in shown] == [token_text(int(other), encoder) for other in best]
            assert [cosine for _, cosine in shown] == pytest.approx(cosines[best], abs=1e-5)


def behaviour_rank(rank: int, world_size: int, checkpoint: Path, samples: np.ndarray):
    """Losses one target at a time, and outputs of attention's output matrices."""
    from bov_megatron.exchange.convert import in_memory

    model, outputs = in_memory(checkpoint), {}
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.o_proj.register_forward_hook(lambda m, i, out, number=number: outputs.setdefault(number, out))
    ids = torch.as_tensor(samples)
    with torch.no_grad():
        logprobs = model(ids[:, :-1], use_cache=False).logits.double().log_softmax(-1)
    losses = [-float(logprobs[b, t, ids[b, t + 1]]) for b in range(len(ids)) for t in range(ids.size(1) - 1)]
    return losses, [float(outputs[n].double().square().sum(-1).mean()) for n in sorted(outputs)]


def test_losses_and_attention_are_the_models(found, bank_run, baseline_run, prepared_data):
    from bov_megatron.data.shards import DataSet

    samples = DataSet(prepared_data.folder).split("val").read(np.arange(3))
    for run, inspected in zip((bank_run, baseline_run), found.runs, strict=True):
        ((losses, squares),) = run_ranks(behaviour_rank, 1, latest_checkpoint(run), samples)
        assert inspected.behaviour.losses == pytest.approx(np.array(losses), rel=1e-3, abs=1e-4)
        assert inspected.behaviour.attention == pytest.approx(np.array(squares), rel=1e-3)
    bank, baseline = found.losses
    everything = np.bincount(bank.bins[bank.bins >= 0])
    assert (everything == bank.counts).all() and (bank.bins == baseline.bins).all()
    difference, error = bank.difference_to(baseline)
    assert difference == pytest.approx(bank.means - baseline.means)
    gains, own = bank.losses - baseline.losses, bank.bins == 0
    sums = [(gains[own & (bank.samples == sample)] - difference[0]).sum() for sample in range(3)]
    assert error[0] == pytest.approx(np.sqrt(1.5 * np.square(sums).sum()) / own.sum())
    squares = found.runs[0].behaviour.attention
    assert found.runs[0].source_share == pytest.approx(squares[1:].sum() / squares.sum())
    assert found.runs[1].source_layers == []


def test_coefficients_are_those_of_the_metrics(found, bank_run):
    lines = [line for line in metrics(bank_run) if "gamma/layer_1" in line]
    (first, second) = found.coefficients
    assert (first.layer, second.layer) == (1, 2)
    assert first.values.tolist() == [line["gamma/layer_1"] for line in lines] and len(lines) >= 3
    assert first.steps.tolist() == [line["step"] for line in lines]


def command_rank(rank: int, world_size: int, arguments: list[str]) -> int:
    from bov_megatron.commands import main

    return main(["inspect_run", *map(str, arguments)])


def test_the_page_needs_nothing_else(bank_run, baseline_run, tmp_path):
    arguments = [bank_run, baseline_run, "--out", tmp_path / "page", "--samples", "2", "--count", "20000"]
    assert run_ranks(command_rank, 1, arguments) == [0]
    text = (tmp_path / "page" / "index.html").read_text()
    assert not re.search(r"""(src|href|srcset)=["'](?!data:|#)""", text) and "http" not in re.sub(r"data:\S+", "", text)
    names = {path.stem for path in (tmp_path / "page" / "figures").glob("*.png")}
    assert names == {"coefficients", "row_norms", "distances", "attention", "losses"}
    assert text.count("<figure") == 5 and "bank is " in text and "than baseline by" in text
    assert 8 < text.count('class="token"') <= 12


def test_without_samples_no_model_is_built(bank_run, tmp_path):
    arguments = [bank_run, "--out", tmp_path, "--samples", "0", "--tokens", " def"]
    assert run_ranks(command_rank, 1, arguments) == [0]
    text = (tmp_path / "index.html").read_text()
    assert "No model was built" in text and 'id="attention"' not in text and text.count('class="token"') == 1


def test_a_baseline_alone_has_no_tables(baseline_run, tmp_path):
    assert run_ranks(command_rank, 1, [baseline_run, "--out", tmp_path, "--samples", "1"]) == [0]
    text = (tmp_path / "index.html").read_text()
    assert "no tables" in text and 'id="tables"' not in text and 'id="losses"' in text


def refused_rank(rank: int, world_size: int, run: Path, other: Path | None, options: dict) -> tuple[type, str]:
    try:
        inspect_rank(rank, world_size, run, other, options)
    except Exception as error:
        return type(error), str(error)
    raise AssertionError("not refused")


@pytest.mark.parametrize(
    "options, kind, said",
    [
        ({"tokens": ["import os"]}, EvaluationError, "--tokens 'import os' is "),
        ({"data": Path("/nowhere")}, DataError, "or give the place of the run's data with --data"),
    ],
)
def test_bad_input_is_named(bank_run, options, kind, said):
    ((found_kind, text),) = run_ranks(refused_rank, 1, bank_run, None, {"samples": 0, **options})
    assert found_kind is kind and said in text


def test_an_export_is_no_run(tmp_path):
    from bov_megatron.inspection.findings import Options, inspect

    (tmp_path / "config.json").write_text(json.dumps({}))
    with pytest.raises(RunFolderError, match="is an export, without the run that it is of"):
        inspect(tmp_path, None, Options())
