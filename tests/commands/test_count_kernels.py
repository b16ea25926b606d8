"""experiments/count_kernels.py: what counts as a kernel, and how many a step may launch."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.kernels import Launches, count_launches
from flaxnets.cli.main import run_command
from tests.conftest import ROOT, load_script

SCRIPT = ROOT / "experiments" / "count_kernels.py"
PLUGIN = os.environ.get("FLAXNETS_CUDA_PLUGIN", "")

HLO = """\
HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%fused_add (param_0: f32[8]) -> f32[8] {
  %param_0 = f32[8]{0} parameter(0)
  %exponential.1 = f32[8]{0} exponential(%param_0)
  ROOT %add.1 = f32[8]{0} add(%exponential.1, %param_0)
}

%command_buffer (p: f32[8]) -> (f32[8], f32[8]) {
  %p = f32[8]{0} parameter(0)
  %loop_add_fusion.2 = f32[8]{0} fusion(%p), kind=kLoop, calls=%fused_add
  %copy.4 = f32[8]{0} copy(%loop_add_fusion.2), metadata={op_name="copy(x)"}
  ROOT %tuple.2 = (f32[8]{0}, f32[8]{0}) tuple(%loop_add_fusion.2, %copy.4)
}

%body (q: f32[8]) -> f32[8] {
  %q = f32[8]{0} parameter(0)
  ROOT %loop_add_fusion.3 = f32[8]{0} fusion(%q), kind=kLoop, calls=%fused_add
}

%left (r: f32[8]) -> f32[8] {
  %r = f32[8]{0} parameter(0)
  ROOT %wrapped_transpose = f32[8]{0} fusion(%r), kind=kInput, calls=%fused_add
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0), sharding={replicated}
  %constant.1 = f32[] constant(0)
  %bitcast.1 = f32[2,4]{1,0} bitcast(%x)
  %call = (f32[8]{0}, f32[8]{0}) call(%x), to_apply=%command_buffer
  %gte = f32[8]{0} get-tuple-element(%call), index=0
  %conv.1 = (f32[8]{0}, u8[0]{0}) custom-call(%gte), custom_call_target="__cudnn$convForward"
  %gemm.1 = (f32[8]{0}, s8[64]{0}) custom-call(%gte), custom_call_target="__cublas$gemm"
  %start = f32[8]{0} all-reduce-start(%gte), replica_groups={{0,1}}, to_apply=%fused_add
  %done = f32[8]{0} all-reduce-done(%start)
  %while = f32[8]{0} while(%done), condition=%body, body=%body
  %branch = f32[8]{0} conditional(%x, %x, %x), branch_computations={%left, %body}
  %memory = f32[8]{0} sort(%branch), dimensions={0}, to_apply=%fused_add
  ROOT %input_transpose_fusion = f32[8]{0} fusion(%memory), kind=kInput, calls=%fused_add
}
"""


def test_what_counts_as_a_kernel():
    assert count_launches(HLO) == Launches(
        convolutions=1, fusions=4, transposes=2, copies=1, collectives=1, other=2
    )
    assert count_launches(HLO).total == 11


def test_a_fused_update_in_pytorch_is_split_as_it_splits_it():
    pytest.importorskip("torch")
    from experiments.contenders.torch_kernels import count_fused_launches

    chunk = 65_536
    assert count_fused_launches([10]) == 1
    assert count_fused_launches([10] * 48) == 1
    assert count_fused_launches([10] * 49) == 2
    assert count_fused_launches([320 * chunk]) == 1
    assert count_fused_launches([320 * chunk + 1]) == 2
    assert count_fused_launches([chunk, 320 * chunk]) == 2


def test_kernels_of_pytorch():
    pytest.importorskip("torch")
    from experiments.contenders.inputs import describe_architecture
    from experiments.contenders.torch_kernels import count_torch_kernels

    shallow, deep = (
        count_torch_kernels(describe_architecture(f"cifar_plain{depth}"), 8, False)
        for depth in (8, 14)
    )
    # Six more layers: three convolutions each (value, two gradients), BatchNorm and its gradient,
    # its counter, and a rectifier and its gradient.
    assert deep - shallow == 6 * (3 + 3 + 2)


def test_a_missing_plugin_is_an_error_of_one_line(tmp_path, capsys):
    command = load_script("count_kernels")
    assert run_command(command.main, ["--plugin", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1
    assert f"pip install --target {tmp_path} --no-deps jax-cuda12-plugin==" in message


@pytest.mark.slow
@pytest.mark.skipif(
    not Path(PLUGIN, "jax_plugins").is_dir(),
    reason="FLAXNETS_CUDA_PLUGIN names no directory of experiments/count_kernels.py --plugin",
)
@pytest.mark.parametrize(
    ("network", "precision", "kernels", "transposes"),
    [
        ("cifar_resnet20", "float32", 259, 12),
        ("cifar_resnet20", "bfloat16", 261, 12),
        ("resnet50", "bfloat16", 757, 73),
    ],
)
def test_a_step_launches_no_more_kernels(network, precision, kernels, transposes):
    arguments = ["--plugin", PLUGIN, "--models", network, "--precision", precision]
    done = subprocess.run(
        [sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=True
    )
    (row,) = re.findall(rf"{network}.*{precision}(.*)", done.stdout)
    counts = list(map(int, row.split()[:6]))
    assert counts[0] <= kernels
    assert counts[3] <= transposes
    assert counts[4] == 0  # copies
