"""Work and waits of a profile belong to their operators."""

from experiments.engine.profiles import device_work, host_waits, operator_ms, within


def event(cat, name, ts, dur, tid=1, **args):
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": args}


PROFILE = [
    {"ph": "M", "name": "process_name", "pid": 0},
    event("user_annotation", "step", 0.0, 100.0),
    event("user_annotation", "scmoe/route", 1.0, 20.0),
    event("cpu_op", "aten::mm", 2.0, 5.0),
    event("cuda_runtime", "cudaLaunchKernel", 3.0, 1.0, correlation=1),
    event("cpu_op", "aten::item", 10.0, 8.0),
    event("cpu_op", "aten::_local_scalar_dense", 11.0, 6.0),
    event("cuda_runtime", "cudaMemcpyAsync", 12.0, 1.0, correlation=2),
    event("cuda_runtime", "cudaStreamSynchronize", 13.0, 3.0, correlation=3),
    event(
        "cuda_runtime", "cudaLaunchKernel", 50.0, 1.0, tid=2, correlation=4
    ),  # backward runs on another thread
    event("kernel", "gemm", 40.0, 1000.0, tid=7, correlation=1, grid=[4, 2, 1]),
    event("gpu_memcpy", "Memcpy DtoH", 41.0, 500.0, tid=7, correlation=2),
    event("kernel", "gemm_backward", 2000.0, 3000.0, tid=7, correlation=4, grid=[1, 1, 1]),
    event("gpu_user_annotation", "scmoe/route", 40.0, 1500.0, tid=7),
    event("cuda_runtime", "cudaDeviceSynchronize", 200.0, 3.0, correlation=5),  # after the step
    event("kernel", "of another step", 300.0, 9000.0, tid=7, correlation=6, grid=[1, 1, 1]),
]


def test_work_of_the_device_and_waits_of_the_host_belong_to_the_operator_that_launched_them():
    events = within(PROFILE, "step")
    assert operator_ms(events) == {"route": 1.5}
    work = device_work(events)
    assert (work["kernels"], work["kernel_ms"], work["copies"], work["copy_ms"]) == (2, 4.0, 1, 0.5)
    assert list(work["longest_kernels_ms"]) == ["gemm_backward", "gemm"]
    assert host_waits(events) == {
        "cudaStreamSynchronize in aten::_local_scalar_dense of scmoe/route": 1
    }


def test_without_a_device_an_operator_takes_its_time_on_the_host():
    on_host = [e for e in PROFILE if e.get("cat") in ("user_annotation", "cpu_op")]
    assert operator_ms(within(on_host, "step")) == {"route": 0.02}
