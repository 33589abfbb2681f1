"""What openv4 uses of DeepSpeed is there: much of it has private names, and a new version may have dropped some."""

import inspect
from importlib import metadata

import pytest
from packaging.version import Version

pytest.importorskip("deepspeed")


def test_version() -> None:
    """That on which the facts about it were measured."""
    assert Version("0.19.8") <= Version(metadata.version("deepspeed")) < Version("0.20")


def test_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.moe.layer import MoE
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
    from deepspeed.utils import groups, safe_get_full_optimizer_state, safe_set_full_optimizer_state

    for name in (
        "_create_expert_and_data_parallel",
        "_get_expert_parallel_group",
        "_get_expert_data_parallel_group",
    ):
        assert callable(getattr(groups, name)), name
    assert callable(MoE.set_deepspeed_parallelism)
    assert isinstance(deepspeed.ops.__compatible_ops__, dict)
    assert callable(DeepSpeedEngine.set_gradient_accumulation_boundary)
    source = inspect.getsource(DeepSpeedEngine)
    for name in ("self.enable_backward_allreduce", "self.has_moe_layers", "scale_wrt_gas=True"):
        assert name in source, name
    source = inspect.getsource(DeepSpeedZeroOptimizer)
    for name in (
        "averaged_gradients",
        "bit16_groups",
        "single_partition_of_fp32_groups",
        "_hp_optimizer_states_linked",
        "_lazy_init_hp_params_optimizer_state",
        "refresh_fp32_params",
    ):
        assert name in source, name
    assert callable(safe_get_full_optimizer_state) and callable(safe_set_full_optimizer_state)
