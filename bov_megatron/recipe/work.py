"""What one rank computes and moves within its memory in a step, for the roofline. docs/use/plan.md has the formulas."""

from __future__ import annotations

from collections import Counter

from bov_megatron.recipe import memory
from bov_megatron.recipe.fields import ModelConfig, Recipe
from bov_megatron.recipe.parameters import parameter_specs


def work_of_stage(recipe: Recipe, chunks: list[range], data_parallel_size: int, stage: int) -> tuple[float, float]:
    """FLOPs of matrix products and attention, and bytes that all other kernels read and write, of a rank's step.

    Args:
        chunks: layers of the stage's model chunks.
    """
    train, p = recipe.train, recipe.parallel
    micro_batches = train.global_batch_size // train.micro_batch_size // data_parallel_size
    ranks = data_parallel_size * p.context_parallel_size if p.use_distributed_optimizer else 1
    is_last = stage == p.pipeline_model_parallel_size - 1
    matrices: Counter[int | None] = Counter()
    for spec in parameter_specs(recipe.model):
        matrices[spec.layer] += spec.size * (spec.kind == "matrix")
    flops, moved = _update(recipe, chunks, ranks, stage)
    for chunk in chunks:
        recomputed = memory.recomputed_layers(recipe, len(chunk))
        for number, layer in enumerate(chunk):
            flops += micro_batches * _layer_flops(recipe, layer, matrices[layer], again=number < recomputed)
            moved += micro_batches * _layer_bytes(recipe, layer, again=number < recomputed)
    moved += micro_batches * _gradient_bytes(recipe, chunks, stage)
    if is_last:
        logits = memory.tokens(recipe) * recipe.padded_vocab_size() // p.tensor_model_parallel_size
        flops += micro_batches * 6 * logits * recipe.model.hidden_size
        moved += micro_batches * 3 * logits * memory.weight_bytes(recipe)  # read, and read and overwritten
    return flops, moved


def _layer_flops(recipe: Recipe, layer: int, elements: int, again: bool) -> float:
    """Of a micro-batch, forward, backward and, recomputed, forward again; `elements` are those of its matrices."""
    m, p, tokens = recipe.model, recipe.parallel, memory.tokens(recipe)
    facts = m.facts_of(layer)
    if facts.separate_projection and facts.projects:
        elements += m.kv_dim * m.hidden_size  # the value matrix, a second time
    products = (6 + 2 * again) * tokens * elements
    attended_again = again or p.recompute == "selective"
    # Two products forward; backward the scores once more, and two for each.
    attention = (7 + 2 * attended_again) * 2 * tokens * m.query_dim * _keys_seen(m, layer)
    return (products + attention) / p.tensor_model_parallel_size


def _keys_seen(model: ModelConfig, layer: int) -> float:
    """Mean over the queries of a sequence."""
    length = model.sequence_length
    window = min(model.windows()[layer], length - 1)
    return (window + 1) * (1 - window / (2 * length))


def _layer_bytes(recipe: Recipe, layer: int, again: bool) -> float:
    """Of a micro-batch: what norms, rotation, activation, residuals and lookups read and write."""
    m, t = recipe.model, recipe.parallel.tensor_model_parallel_size
    facts = m.facts_of(layer)
    query, kv = m.query_dim / t, memory.kv_width(recipe) / t
    # Two norms and two residual sums; rotation and copy of attention's output; activation.
    forward = 9 * memory.residual(recipe) / memory.weight_bytes(recipe) / memory.tokens(recipe)
    forward += 4 * query + 2 * kv + 2 * m.ffn_size / t
    backward = 14 * memory.residual(recipe) / memory.weight_bytes(recipe) / memory.tokens(recipe)
    backward += 5 * (query + kv) + 3 * m.ffn_size / t
    if facts.fused_projection:
        backward += 2 * kv
    context = recipe.parallel.context_parallel_size
    if context > 1:  # keys and values put in order, and their gradients from both stretches of queries
        forward, backward = forward + (4 + 4 * context) * kv + 2 * query, backward + 26 * context * kv
    if facts.has_table:  # gathered by token, scaled, and its gradient summed in fp32
        forward, backward = forward + 4 * kv, backward + 14 * kv
    elements = (2 if again else 1) * forward + backward
    return elements * memory.tokens(recipe) * memory.weight_bytes(recipe)


def _gradient_bytes(recipe: Recipe, chunks: list[range], stage: int) -> float:
    """Of a micro-batch: adding to fp32 buffers the weight gradients that no matrix product or lookup adds itself."""
    sizes = (
        memory.rank_size(recipe, spec)
        for spec in parameter_specs(recipe.model)
        if memory.is_on_stage(spec, stage, chunks, recipe) and spec.kind not in ("matrix", "output", "table")
    )
    return sum(sizes) * (2 * memory.MAIN_BYTES + memory.weight_bytes(recipe))


def _update(recipe: Recipe, chunks: list[range], ranks: int, stage: int) -> tuple[float, float]:
    """FLOPs of orthogonalisation, and bytes of reduction, update and gathering, where `ranks` share the update."""
    w, main = memory.weight_bytes(recipe), memory.MAIN_BYTES
    muon, steps = recipe.optimizer.name == "muon", recipe.optimizer.newton_schulz_steps
    costs, moved = [0.0], 0.0
    for spec in parameter_specs(recipe.model):
        if not memory.is_on_stage(spec, stage, chunks, recipe) or memory.is_on_host(recipe, spec):
            continue
        size = memory.rank_size(recipe, spec)
        moved += size * 3 * main  # cleared, and scaled before the reduction
        moved += size * (3 * w if ranks > 1 else 0)  # gathered weights copied, own ones sent
        if spec.kind == "matrix" and muon:
            short, long = sorted(spec.shape)
            costs.append(steps * (4 * short**2 * long + 2 * short**3))
            moved += size / ranks * (12 * main + 8 * steps)
        else:
            moved += size / ranks * 8 * main
    shared = sum(costs) / ranks / recipe.parallel.tensor_model_parallel_size
    return max(shared, max(costs) if ranks > 1 else 0), moved
