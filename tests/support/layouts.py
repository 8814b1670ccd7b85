"""Parallel layouts that tests go through: name -> (ranks, fields of the recipe's `parallel` section)."""

TP2, TP4, PP2 = (
    {"tensor_model_parallel_size": 2},
    {"tensor_model_parallel_size": 4},
    {"pipeline_model_parallel_size": 2},
)
VPP2 = {"virtual_pipeline_model_parallel_size": 2}
CP2, CP4 = {"context_parallel_size": 2}, {"context_parallel_size": 4}
OVERLAP = {"overlap_param_gather": True}
SP, FULL, SELECTIVE = {"sequence_parallel": True}, {"recompute": "full"}, {"recompute": "selective"}
LAYOUTS = {
    "tp2": (2, TP2),
    "tp4": (4, TP4),
    "tp2-sp": (2, {**TP2, **SP}),
    "pp2": (2, PP2),
    "pp2-tp2": (4, {**PP2, **TP2}),
    "pp2-tp2-sp-full": (4, {**PP2, **TP2, **SP, **FULL}),
    "pp2-full": (2, {**PP2, **FULL}),
    "full": (1, FULL),
    "full-of-2": (1, {**FULL, "recompute_num_layers": 2}),
    "pp2-full-of-1": (2, {**PP2, **FULL, "recompute_num_layers": 1}),
    "selective": (1, SELECTIVE),
    "tp2-selective": (2, {**TP2, **SELECTIVE}),
    "dp2": (2, {}),
    "dp2-replicated-optimizer": (2, {"use_distributed_optimizer": False}),
    "dp2-tp2": (4, TP2),
    "dp2-pp2": (4, PP2),
    "vpp2": (2, {**PP2, **VPP2}),
    "pp2-uneven": (2, {**PP2, "pipeline_layers": [1, 3]}),
    "pp3-by-time": (3, {"pipeline_model_parallel_size": 3, "pipeline_balance": "time"}),
    "pp3-by-memory": (3, {"pipeline_model_parallel_size": 3, "pipeline_balance": "memory"}),
    "vpp2-tp2-sp-full": (4, {**PP2, **VPP2, **TP2, **SP, **FULL}),
    "vpp2-dp2": (4, {**PP2, **VPP2}),
    "vpp2-cp2": (4, {**PP2, **VPP2, **CP2}),
    "cp2": (2, CP2),
    "cp4": (4, CP4),
    "cp2-tp2-sp": (4, {**CP2, **TP2, **SP}),
    "cp2-pp2-full": (4, {**CP2, **PP2, **FULL}),
    "cp2-dp2": (4, CP2),
    "cp2-selective": (2, {**CP2, **SELECTIVE}),
    "dp2-no-overlap": (2, {"overlap_grad_reduce": False}),
    "dp2-overlap": (2, OVERLAP),
    "dp2-pp2-overlap": (4, {**PP2, **OVERLAP}),
    "vpp2-dp2-overlap": (4, {**PP2, **VPP2, **OVERLAP}),
    "dp2-tp2-full-overlap": (4, {**TP2, **FULL, **OVERLAP}),
}
