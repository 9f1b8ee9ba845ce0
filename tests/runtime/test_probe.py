"""The probe: fills the hardware dimension from a made-up machine and from this one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from runtime.probe import pinned_environment, probe

CPUINFO = """\
processor\t: 0
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 207
model name\t: Intel(R) Xeon(R) Processor
stepping\t: 2
microcode\t: 0x21
siblings\t: 4
cpu cores\t: 2
flags\t\t: fpu vme sse2 avx2 amx_bf16 avx512f hypervisor

processor\t: 1
vendor_id\t: Other
"""


def _machine(folder: Path, cpuinfo: str) -> Path:
    (folder / "proc").mkdir(parents=True)
    (folder / "proc" / "cpuinfo").write_text(cpuinfo, encoding="utf-8")
    return folder


def test_reads_a_processor(tmp_path: Path) -> None:
    found = probe(root=_machine(tmp_path, CPUINFO), environment={})
    assert found.cpu_model == "Intel(R) Xeon(R) Processor (GenuineIntel family 6 model 207 stepping 2)"
    assert found.isa_flags == ("amx_bf16", "avx2", "avx512f", "sse2")
    assert found.firmware == "0x21"
    assert found.topology.startswith("2 cores, 4 threads a socket")
    assert (found.gpu, found.gpu_driver) == (None, None)
    assert found.threads == 1


def test_reads_an_arm_processor(tmp_path: Path) -> None:
    text = "processor\t: 0\nFeatures\t: fp asimd i8mm sve\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n"
    found = probe(root=_machine(tmp_path, text), environment={})
    assert "0x41" in found.cpu_model and "0xd40" in found.cpu_model
    assert found.isa_flags == ("asimd", "i8mm", "sve")


def test_a_machine_that_says_nothing_still_has_a_description(tmp_path: Path) -> None:
    found = probe(root=tmp_path, environment={})
    assert found.cpu_model
    assert found.isa_flags == ()


def test_reads_gpus_and_their_driver(tmp_path: Path) -> None:
    root = _machine(tmp_path, CPUINFO)
    driver = root / "proc" / "driver" / "nvidia"
    for bus in ("0000:01:00.0", "0000:02:00.0"):
        (driver / "gpus" / bus).mkdir(parents=True)
        (driver / "gpus" / bus / "information").write_text("Model: \t\t NVIDIA H200\nIRQ: 16\n", encoding="utf-8")
    (driver / "version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu\n", encoding="utf-8"
    )
    found = probe(root=root, environment={})
    assert found.gpu == "NVIDIA H200, NVIDIA H200"
    assert found.gpu_driver == "570.86.15"


def test_reads_only_variables_that_reach_the_bits(tmp_path: Path) -> None:
    environment = {"MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "2,1", "API_KEY": "secret"}
    found = probe(root=tmp_path, environment=environment)
    assert found.environment == {"MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "2,1"}
    assert found.threads == 2
    assert probe(root=tmp_path, environment=environment, threads=4).threads == 4
    assert probe(root=tmp_path, environment={"OMP_NUM_THREADS": "many"}).threads == 1


def test_a_worker_gets_the_recorded_settings_and_no_others(tmp_path: Path) -> None:
    recorded = probe(root=tmp_path, environment={"MKL_CBWR": "COMPATIBLE"}, threads=2)
    here = {"PATH": "/bin", "MKL_CBWR": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "7"}
    inside = pinned_environment(recorded, here)
    assert inside == {"PATH": "/bin", "MKL_CBWR": "COMPATIBLE"}
    assert probe(root=tmp_path, environment=inside, threads=2) == recorded


def test_a_recorded_thread_variable_follows_the_thread_pin(tmp_path: Path) -> None:
    recorded = probe(root=tmp_path, environment={"OMP_NUM_THREADS": "1"})
    assert pinned_environment(recorded, {}) == {"OMP_NUM_THREADS": "1"}
    changed = recorded.model_copy(update={"threads": 2})
    assert pinned_environment(changed, {}) == {"OMP_NUM_THREADS": "2"}


def test_two_probes_of_this_machine_agree() -> None:
    assert probe() == probe()
    assert probe().digest == probe().digest


def test_the_probe_imports_no_numeric_library() -> None:
    program = "from runtime.probe import probe; probe(); import sys; print(sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "'torch'" not in loaded and "'numpy'" not in loaded and "'onnxruntime'" not in loaded
