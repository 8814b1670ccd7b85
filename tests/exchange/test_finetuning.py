"""Fine-tuning an export with Hugging Face's tools. Also run on transformers 5."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from bov_megatron.exchange.hf.modeling_bov import BovCache, BovForCausalLM
from tests.support.small_models import VARIANTS, random_ids, small_model


def gradients(model, ids):
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("options", [None, {"use_reentrant": True}])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_checkpointing_changes_no_gradient(variant, options):
    """Nor does the reentrant kind, which 4.57 uses if it isn't told otherwise."""
    model, ids = small_model(VARIANTS[variant]).train(), random_ids(2, 12)
    expected = gradients(model, ids)
    model.gradient_checkpointing_enable(options)
    calls = []
    model.model.layers[2].mlp.register_forward_pre_hook(lambda *arguments: calls.append(arguments[0]))
    found = gradients(model, ids)
    assert len(calls) == 2, "the layer was not computed again"
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_gradient_checkpointing_and_caches():
    model, ids = small_model(VARIANTS["bank"]).train(), random_ids(2, 6)
    model.gradient_checkpointing_enable()
    assert model(ids, use_cache=True).past_key_values is None
    with pytest.raises(ValueError, match="doesn't work with gradient checkpointing in training"):
        model(ids, past_key_values=BovCache(model.config))
    options = dict(max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(ids, **options), model.eval().generate(ids, **options))


@pytest.mark.parametrize("variant", ["bank", "bank_listed_shared_fixed", "gated_shared", "projection"])
@torch.no_grad()
def test_resizing_the_vocabulary_resizes_the_tables(variant, tmp_path):
    model, ids = small_model(VARIANTS[variant]), random_ids(2, 8)
    before = model(ids).logits
    model.resize_token_embeddings(64)
    assert {p.shape[0] for name, p in model.named_parameters() if "table" in name or "embed" in name} == {64}
    torch.testing.assert_close(model(ids).logits[..., :61], before)
    ids[:, 3] = 63
    assert model(ids).logits.isfinite().all()
    assert model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0).shape == (2, 10)
    model.save_pretrained(tmp_path)
    assert torch.equal(BovForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)
    model.resize_token_embeddings(50)
    assert model(ids.clamp(max=49)).logits.shape[-1] == 50


class Rows(Dataset):
    """Rows whose numbers of labels differ, so that a mean of means isn't the mean."""

    def __init__(self):
        self.ids = random_ids(8, 12)
        self.labels = self.ids.masked_fill(torch.arange(12) < torch.arange(1, 9)[:, None], -100)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "attention_mask": torch.ones_like(self.ids[i]), "labels": self.labels[i]}


def trainer(folder, batch, accumulation, **options):
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation, learning_rate=0.05, optim="sgd", lr_scheduler_type="constant",
        max_grad_norm=0.0, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
        seed=3, **options,
    )  # fmt: skip
    return Trainer(model=small_model(VARIANTS["bank"]), args=arguments, train_dataset=Rows(), eval_dataset=Rows())


def test_trainer_learns_the_same_with_accumulation_and_checkpointing(tmp_path):
    whole = trainer(tmp_path, 4, 1)
    pieces = trainer(tmp_path, 2, 2, gradient_checkpointing=True)
    for each in (whole, pieces):
        each.train()
    for (name, one), two in zip(whole.model.named_parameters(), pieces.model.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5, msg=name)
    losses = [line["loss"] for line in whole.state.log_history if "loss" in line]
    assert losses == pytest.approx([line["loss"] for line in pieces.state.log_history if "loss" in line], rel=1e-3)
    assert losses[-1] < losses[0]

    predicted = whole.predict(Rows())
    assert predicted.predictions.shape == (8, 12, 61), "predictions are the logits, without the cache"
    logits = torch.from_numpy(predicted.predictions)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), Rows().labels[:, 1:].flatten()).item()
    # The mean of one batch of 8 rows.
    assert predicted.metrics["test_loss"] == pytest.approx(expected, rel=1e-4)

    whole.save_model(tmp_path / "tuned")
    again = BovForCausalLM.from_pretrained(tmp_path / "tuned")
    ids = random_ids(1, 6)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, whole.model.eval()(ids).logits)
