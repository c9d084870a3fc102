"""torch.compile of the blocks. Where only the tracing matters the backend is aot_eager, which generates no code."""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

from networks.adapter import create
from networks.settings import NetworkSettings
from tests.parity.dit_cases import load, lora_file, run
from tests.parity.golden import TOLERANCE, load_case, relative_error
from wan_train.compile import Trial, apply_compile, apply_device_flags, check_compile
from wan_train.errors import InputError
from wan_train.models.dit.dit import Dit, DitConfig
from wan_train.placement.chunks import apply_chunks
from wan_train.placement.lanes import HostLane
from wan_train.placement.recompute import apply_recompute
from wan_train.placement.settings import COMPILE_MODES, CompileSettings, RecomputeSettings, StreamSettings
from wan_train.placement.stream import apply_stream
from wan_train.precision import InputGradient, Linear
from wan_train.quantization.schemes import SCHEMES, Scheme, trial_linear
from wan_train.quantization.settings import FastWeightSettings, WeightSettings
from wan_train.quantization.stored import scheme_names

CPU = torch.device("cpu")
# aot_eager traces the backward pass too, eager the forward pass alone, which is enough to count graphs.
TRACED = CompileSettings(compile=True, compile_backend="aot_eager", compile_fullgraph=True)
COUNTED = replace(TRACED, compile_backend="eager")
BROKEN = replace(COUNTED, compile_fullgraph=False)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    with held(torch._dynamo.config, "recompile_limit", "accumulated_recompile_limit", "optimize_ddp"):
        with held(torch._functorch.config, "ban_recompute_materialized_backward"):
            yield
    torch._dynamo.reset()


def held(config: Any, *names: str) -> AbstractContextManager[None]:
    """What is set of these inside is as before behind."""
    return config.patch({name: getattr(config, name) for name in names})


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def model(num_layers: int = 2, *, lora: bool = False) -> Dit:
    torch.manual_seed(0)
    made = Dit(DitConfig(dim=48, ffn_dim=96, num_heads=2, num_layers=num_layers, text_dim=8)).requires_grad_(False)
    for weight in made.parameters():
        weight.data = torch.randn(weight.shape) / max(weight.shape[-1], 4) ** 0.5
    if lora:
        create(made, NetworkSettings(network_dim=4), seed=0)
        for name, weight in made.named_parameters():
            if "lora.up" in name:
                weight.data = 0.1 * torch.randn(weight.shape)
    return made


def step(dit: Dit, size: tuple[int, int, int] = (2, 4, 6), batch: int = 1) -> tuple[Tensor, list[Tensor]]:
    """The output for an image of `size`, and the gradients of what learns."""
    generator = torch.Generator().manual_seed(1)
    device = next(dit.parameters()).device
    latents = torch.randn(batch, 16, *size, generator=generator).to(device)
    text = [torch.randn(3, 8, generator=generator).to(device) for _ in range(batch)]
    out = dit(latents, torch.full((batch,), 500.0, device=device), text)
    learning = [p for p in dit.parameters() if p.requires_grad]
    if not (learning and torch.is_grad_enabled()):
        return out.detach(), []
    return out.detach(), list(torch.autograd.grad(out.square().mean(), learning))


def agree(one: tuple[Tensor, list[Tensor]], other: tuple[Tensor, list[Tensor]]) -> bool:
    (out, grads), (other_out, other_grads) = one, other
    if len(grads) != len(other_grads) or relative_error(out, other_out) > 1e-5:
        return False
    flat, other_flat = (torch.cat([torch.zeros(1), *(g.flatten() for g in each)]) for each in (grads, other_grads))
    return torch.equal(flat, other_flat) or relative_error(flat, other_flat) < 1e-5


def twins(**kind: object) -> tuple[Dit, Dit]:
    """A plain model and a compiled copy."""
    plain = model(**kind)  # type: ignore[arg-type]
    compiled = copy.deepcopy(plain)
    return plain, compiled


def test_without_the_switch_blocks_stay_as_they_are() -> None:
    dit = model(1)
    before = dit.blocks[0].forward
    apply_compile(dit.blocks, CompileSettings())
    assert dit.blocks[0].forward == before


def test_all_blocks_and_all_sizes_share_one_graph() -> None:
    plain, compiled = twins()
    apply_compile(compiled.blocks, TRACED)
    with torch.no_grad():
        for size in ((2, 4, 6), (1, 8, 8), (3, 2, 4)):
            assert agree(step(compiled, size), step(plain, size))
            assert graphs() == 1


def count_by_size(dynamic: str) -> list[int]:
    """Graphs there are after each of three sizes."""
    compiled, counts = model(1), []
    apply_compile(compiled.blocks, CompileSettings(compile=True, compile_backend="eager", compile_dynamic=dynamic))
    with torch.no_grad():
        for size in ((2, 4, 6), (1, 8, 8), (3, 2, 4)):
            step(compiled, size)
            counts.append(graphs())
    return counts


def test_dynamic_says_whether_a_size_is_compiled_for_itself() -> None:
    first, *rest = count_by_size("true")
    assert rest == [first, first]
    torch._dynamo.reset()
    counters.clear()
    first, second, third = count_by_size("false")
    assert first < second < third


def test_a_lora_trains_on_it_in_few_graphs_and_no_step_compiles_again() -> None:
    plain, compiled = twins(lora=True)
    apply_compile(compiled.blocks, COUNTED)
    for size in ((2, 4, 6), (2, 4, 6), (1, 8, 8)):
        assert agree(step(compiled, size), step(plain, size))
        assert graphs() == 2  # the first block's input needs no gradient
    for _ in range(2):  # a preview, then on with training
        compiled.eval()
        with torch.no_grad():
            assert agree(step(compiled), step(plain))
        compiled.train()
        step(compiled)
    assert graphs() <= 4


def test_batches_of_other_sizes_settle() -> None:
    compiled = model(1)
    apply_compile(compiled.blocks, COUNTED)
    with torch.no_grad():
        for batch in (1, 2, 3, 4, 1, 5):
            step(compiled, batch=batch)
    assert graphs() <= 3


def test_weights_in_fewer_bits() -> None:
    plain = model(1, lora=True)
    for attention in (plain.blocks[0].self_attn, plain.blocks[0].cross_attn):
        attention.q.weight.data = attention.q.weight.data.bfloat16()  # type: ignore[union-attr, operator]
        for leaf, scheme in (("k", "fp8"), ("v", "fp8_scaled"), ("o", "int8")):
            store(getattr(attention, leaf), SCHEMES[scheme])
    compiled = copy.deepcopy(plain)
    apply_compile(compiled.blocks, TRACED)
    assert agree(step(compiled), step(plain))
    assert graphs() == 1


def test_widened_weights_are_not_kept_for_the_backward_pass() -> None:
    plain = model(1, lora=True)
    for linear in (plain.blocks[0].ffn[0], plain.blocks[0].ffn[2]):  # type: ignore[index]
        store(linear, SCHEMES["fp8_scaled"])
    compiled = copy.deepcopy(plain)
    apply_compile(compiled.blocks, replace(TRACED, compile_backend="aot_eager_decomp_partition"))  # as inductor does
    assert kept_bytes(compiled) <= kept_bytes(plain)


def kept_bytes(dit: Dit) -> int:
    """Bytes that the backward pass keeps alive beside the weights."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = dit(torch.ones(1, 16, 1, 4, 4), torch.tensor([500.0]), [torch.ones(3, 8)])
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*dit.parameters(), *dit.buffers())}
    del out
    return sum(size for place, size in kept.items() if place not in weights)


def test_several_processes(tmp_path: Path) -> None:
    plain, compiled = twins(num_layers=1, lora=True)
    apply_compile(compiled.blocks, COUNTED)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        # Buckets far smaller than a block's gradients, as they are for a large model.
        assert agree(step(DistributedDataParallel(compiled, bucket_cap_mb=0.001)), step(plain))  # type: ignore[arg-type]
    finally:
        torch.distributed.destroy_process_group()


def store(linear: Linear, scheme: Scheme) -> None:
    codes = scheme.quantise(linear.weight.data)
    linear.weight = torch.nn.Parameter(codes.weight, requires_grad=False)
    linear.scale_weight = codes.scale
    linear.__class__ = scheme.linear


def test_recomputed_blocks() -> None:
    plain, compiled = twins(num_layers=2, lora=True)
    apply_compile(compiled.blocks, COUNTED)
    apply_recompute(compiled.blocks, RecomputeSettings(recompute="full"), torch.device("cpu"))
    for size in ((2, 4, 6), (1, 8, 8)):
        assert agree(step(compiled, size), step(plain, size))
        assert graphs() == 2


@pytest.mark.slow
def test_kept_attention_takes_a_block_to_pieces_that_all_blocks_share() -> None:
    counts = []
    for num_layers in (2, 4):
        torch._dynamo.reset()
        counters.clear()
        plain, compiled = twins(num_layers=num_layers, lora=True)
        apply_compile(compiled.blocks, BROKEN)
        apply_recompute(compiled.blocks, RecomputeSettings(recompute="keep_attention"), torch.device("cpu"))
        for size in ((2, 4, 6), (1, 8, 8), (3, 2, 4)):
            assert agree(step(compiled, size), step(plain, size))
        counts.append(graphs())
        step(compiled, (2, 8, 4))
        assert graphs() == counts[-1]
    assert counts[0] == counts[1]


def test_a_feed_forward_in_parts() -> None:
    plain, compiled = twins(num_layers=1, lora=True)
    apply_chunks(compiled.blocks, 3)
    apply_compile(compiled.blocks, COUNTED)
    for size in ((2, 4, 6), (1, 8, 8)):
        assert agree(step(compiled, size), step(plain, size))
        assert graphs() == 1


def test_streamed_blocks_compile_nothing_new_as_their_weights_move() -> None:
    plain, compiled = twins(num_layers=4)
    apply_compile(compiled.blocks, COUNTED)
    apply_stream(compiled.blocks, StreamSettings(blocks_to_swap=3), HostLane(torch.device("cpu")))
    with torch.no_grad():
        for _ in range(2):
            assert agree(step(compiled), step(plain))
    assert graphs() == 1


def test_the_limit_of_compilations_is_torchs_limit() -> None:
    compiled = model(1)
    settings = CompileSettings(
        compile=True, compile_backend="eager", compile_dynamic="false", compile_cache_size_limit=2
    )
    apply_compile(compiled.blocks, settings)
    with torch.no_grad():
        for size in ((2, 4, 6), (1, 8, 8), (3, 2, 4), (1, 2, 2)):
            step(compiled, size)
    assert graphs() == 2


def test_options_without_the_switch_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    check_compile(CompileSettings(cuda_allow_tf32=True), device="cpu")
    assert not caplog.messages
    check_compile(CompileSettings(compile_mode="max-autotune"), device="cpu")
    assert caplog.messages == ["--compile_mode has no effect without --compile"]


def test_an_unknown_backend_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"'inductr': known are .*inductor"):
        check_compile(CompileSettings(compile=True, compile_backend="inductr"), device="cpu")


def test_a_backend_whose_package_is_absent_is_refused_in_one_line() -> None:
    settings = CompileSettings(compile=True, compile_backend="tvm")
    with pytest.raises(InputError, match=r"--compile_backend tvm \(.*apache-tvm.*\): leave out --compile") as caught:
        check_compile(settings, device="cpu")
    assert "\n" not in str(caught.value)


def test_a_mode_is_for_inductor() -> None:
    settings = CompileSettings(compile=True, compile_backend="aot_eager", compile_mode="max-autotune")
    with pytest.raises(InputError, match=r"--compile_mode max-autotune.*--compile_backend aot_eager"):
        check_compile(settings, device="cpu")


def test_a_missing_compiler_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with torch._inductor.config.patch({"cpp.cxx": ("/nowhere/g++",)}):
        with pytest.raises(InputError, match=r"No working C\+\+ compiler.*leave out --compile"):
            check_compile(CompileSettings(compile=True), device="cpu")


def without_e4m3(graph: Any, inputs: list[Tensor]) -> Any:
    """A compiler for a device that has no e4m3."""
    if any(isinstance(each, Tensor) and each.dtype == torch.float8_e4m3fn for each in inputs):
        raise RuntimeError("type fp8e4nv not supported in this architecture\nmore")
    return graph.forward


@pytest.fixture
def old_device() -> Iterator[str]:
    torch._dynamo.register_backend(without_e4m3, name="without_e4m3")
    yield "without_e4m3"
    for registry in (torch._dynamo.backends.registry._BACKENDS, torch._dynamo.backends.registry._COMPILER_FNS):
        registry.pop("without_e4m3", None)


@pytest.mark.parametrize("name", [name for name in SCHEMES if name != "fp8_fast"])
@pytest.mark.parametrize("training", [True, False])
def test_what_the_weights_are_stored_in_is_tried(name: str, training: bool, old_device: str) -> None:
    trial = Trial({name: trial_linear(name, CPU)}, torch.float32, training=training)
    check_compile(TRACED, device=CPU, trial=trial)
    settings = CompileSettings(compile=True, compile_backend=old_device)
    if name == "int8":
        check_compile(settings, device=CPU, trial=trial)
        return
    with pytest.raises(InputError, match=f"on cpu with weights stored as {name} .*fp8e4nv not supported.*leave out"):
        check_compile(settings, device=CPU, trial=trial)


def test_the_backward_pass_is_tried_where_something_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("no such product")

    monkeypatch.setattr(InputGradient, "backward", staticmethod(fail))
    linears = {"int8": trial_linear("int8", CPU)}
    check_compile(COUNTED, device=CPU, trial=Trial(linears))
    with pytest.raises(InputError, match="on cpu with weights stored as int8"):
        check_compile(COUNTED, device=CPU, trial=Trial(linears, training=True))


@pytest.mark.parametrize(
    ("weights", "names"),
    [
        (WeightSettings(), []),
        (WeightSettings(fp8_base=True), ["fp8"]),
        (WeightSettings(fp8_base=True, fp8_scaled=True), ["fp8_scaled"]),
        (WeightSettings(int8_base=True), ["int8"]),
        (FastWeightSettings(fp8_base=True, fp8_scaled=True, fp8_fast=True), ["fp8_fast", "fp8_scaled"]),
    ],
    ids=str,
)
def test_the_trial_is_of_the_settings(weights: WeightSettings, names: list[str]) -> None:
    assert list(scheme_names(weights)) == names


def test_recorded_graphs_and_swapped_blocks_exclude_each_other() -> None:
    settings = CompileSettings(compile=True, compile_mode="reduce-overhead")
    with pytest.raises(InputError, match=r"--compile_mode reduce-overhead.*--blocks_to_swap 3"):
        check_compile(settings, device="cpu", blocks_to_swap=3)


def test_device_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    was = torch.backends.cuda.matmul.allow_tf32
    try:
        apply_device_flags(CompileSettings())
        assert not torch.backends.cudnn.benchmark and torch.backends.cuda.matmul.allow_tf32 == was
        apply_device_flags(CompileSettings(cuda_allow_tf32=True, cuda_cudnn_benchmark=True))
        assert torch.backends.cudnn.benchmark and torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = was


def golden(settings: CompileSettings) -> None:
    """The reference case with its LoRA attached: output and LoRA gradients of the compiled model and of the plain."""
    case = load_case("wan21_t2v_lora")
    rank, alpha = case.spec["lora"]
    results = []
    for each in (CompileSettings(), settings):
        dit = load(case)
        create(dit, NetworkSettings(network_dim=rank, network_alpha=alpha)).load(lora_file(case))
        apply_compile(dit.blocks, each)
        out = run(dit, case)
        learning = [p for p in dit.parameters() if p.requires_grad]
        results.append((out.detach(), list(torch.autograd.grad(out.square().mean(), learning))))
    assert agree(results[1], results[0])
    assert relative_error(results[1][0], case.outputs["out"]) < TOLERANCE


def test_the_reference_case() -> None:
    golden(TRACED)


@pytest.mark.slow
def test_the_reference_case_in_generated_code() -> None:
    golden(CompileSettings(compile=True, compile_fullgraph=True))


def test_the_reference_output_in_generated_code() -> None:
    case = load_case("wan21_t2v")
    dit = load(case)
    check_compile(CompileSettings(compile=True), device="cpu")
    apply_compile(dit.blocks, CompileSettings(compile=True, compile_fullgraph=True))
    with torch.no_grad():
        assert relative_error(run(dit, case), run(load(case), case)) < 1e-5
    assert graphs() == 2  # the trial's and the blocks'


@pytest.mark.gpu
@pytest.mark.parametrize("mode", COMPILE_MODES)
def test_modes_on_a_device(mode: str) -> None:
    plain, compiled = (dit.cuda() for dit in twins(lora=True))
    settings = CompileSettings(compile=True, compile_mode=mode)
    check_compile(settings, device="cuda")
    apply_compile(compiled.blocks, settings)
    for size in ((2, 4, 6), (2, 4, 6), (1, 8, 8)):
        (out, grads), (theirs, their_grads) = step(compiled, size), step(plain, size)
        assert relative_error(out, theirs) < 1e-3
        flat, their_flat = (torch.cat([g.flatten() for g in each]) for each in (grads, their_grads))
        assert relative_error(flat, their_flat) < 1e-3
