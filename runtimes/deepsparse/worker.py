# /// script
# requires-python = "==3.11.*"
# dependencies = [
#     "deepsparse==1.8.0",
#     "annotated-types==0.8.0",
#     "certifi==2026.10.18",
#     "charset-normalizer==3.5.2",
#     "click==8.5.1",
#     "decorator==5.3.1",
#     "flatbuffers==25.12.19",
#     "future==1.0.0",
#     "geocoder==1.38.1",
#     "idna==3.20",
#     "numpy==1.26.4",
#     "onnx==1.14.1",
#     "onnxruntime==1.32.0",
#     "packaging==26.3",
#     "pandas==3.0.6",
#     "protobuf==7.36.2",
#     "py-machineid==1.0.0",
#     "pydantic==2.14.3",
#     "pydantic-core==2.50.4",
#     "python-dateutil==4.0.0",
#     "pyyaml==6.0.3",
#     "ratelim==0.1.6",
#     "requests==2.34.2",
#     "six==1.17.0",
#     "sparsezoo==1.8.1",
#     "tqdm==4.70.1",
#     "typing-extensions==4.16.0",
#     "typing-inspection==0.4.5",
#     "tzdata==2026.6",
#     "urllib3==2.8.0",
# ]
# ///
"""The process that holds DeepSparse: JSON lines in on stdin, JSON lines out on stdout.

It stands alone (standard library, numpy, deepsparse and two files of this package), so that it can run under its own
interpreter. `../worker/process.py` has the other end and describes the lines.

    uv run --script worker.py [--diagnose]

With --diagnose the engine writes to stderr what it makes of every model.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
import time

# Before the import of deepsparse: it would look up the machine's external address and post usage events.
os.environ["NM_DISABLE_ANALYTICS"] = "1"
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # it imports ONNX Runtime, which would write into the user's cache
if "--diagnose" in sys.argv[1:]:
    os.environ["NM_LOGGING_LEVEL"] = "diagnose"

# The modules beside this file must not shadow the engine's (before Python 3.11 there is no PYTHONSAFEPATH).
FOLDER = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120
if os.path.abspath(sys.path[0]) == FOLDER:  # noqa: PTH100
    del sys.path[0]


def load(name, place):
    """The module in a file, which is given by its place from here."""
    spec = importlib.util.spec_from_file_location(name, f"{FOLDER}/{place}")
    assert spec is not None and spec.loader is not None  # a .py file always has a loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


loop = load("loop", "../worker/loop.py")

SPEED_VARIABLES = ("NM_ARCH", "NM_BIND_THREADS_TO_CORES")
kept = loop.Kept()
sessions: dict = {}  # id -> (engine, inputs)


def hello(request):
    """Import the engine and say what it is and where it runs."""
    try:
        import deepsparse.engine
        from deepsparse.cpu import cpu_architecture
    except (ImportError, OSError) as exc:
        # OSError is how deepsparse says that the CPU lacks AVX2, or that the system isn't Linux.
        raise UnavailableError(f"{exc}") from exc
    architecture = cpu_architecture()
    return {
        "protocol": loop.PROTOCOL,
        "pid": os.getpid(),
        "version": deepsparse.__version__,
        "analytics_disabled": os.environ["NM_DISABLE_ANALYTICS"] == "1",
        "cpu": cpu_model() or architecture["vendor_model"],
        "instruction_set": architecture["isa"] + ("_vnni" if architecture["vnni"] else ""),
        "cores": architecture.num_available_physical_cores,
        "host": platform.node(),
        "options": {name: os.environ[name] for name in SPEED_VARIABLES if name in os.environ},
    }


def open_session(request):
    """Compile a model for a batch and a number of cores."""
    from deepsparse.engine import Engine

    inputs = [decode(array) for array in request["inputs"]]
    with ModelInMemory(model_of(request)) as path:
        try:
            engine = Engine(path, batch_size=batch_of(request, inputs), num_cores=request["threads"])
        except (RuntimeError, ValueError) as exc:
            raise RefusedError(f"{exc}") from exc
    number = max(sessions, default=0) + 1
    sessions[number] = engine, inputs
    return {
        "session": number,
        "threads": engine.num_cores,
        "supported": float(engine.fraction_of_supported_ops),
        "inputs": list(engine.input_names),
        "outputs": list(engine.output_names),
    }


def batch_of(request, inputs):
    """The batch as the engine knows it: the first axis of every input; None where one has another there, or none."""
    batch = request["batch"]
    return batch if all(array.ndim and len(array) == batch for array in inputs) else None


def run(request):
    """Outputs of one run, in the order of the graph."""
    engine, _ = sessions[request["session"]]
    outputs = engine.run([decode(array) for array in request["inputs"]])
    return {"outputs": [loop.encode_array(array) for array in outputs]}


def seconds(request):
    """Wall seconds of single runs on the session's own inputs."""
    engine, inputs = sessions[request["session"]]
    for _ in range(request["warmup"]):
        engine.run(inputs)
    measured = []
    for _ in range(request["iterations"]):
        started = time.perf_counter()
        engine.run(inputs)
        measured.append(time.perf_counter() - started)
    return {"seconds": measured}


def layers(request):
    """The engine's own profile: one row a layer, in the order in which they run."""
    from deepsparse.engine import model_debug_analysis

    inputs = [decode(array) for array in request["inputs"]]
    with ModelInMemory(model_of(request)) as path:
        try:
            analysis = model_debug_analysis(
                path,
                inputs,
                batch_size=batch_of(request, inputs),
                num_cores=request["threads"],
                num_iterations=request["iterations"],
                num_warmup_iterations=request["warmup"],
                optimization_level=request["optimization_level"],
            )
        except (RuntimeError, ValueError) as exc:
            raise RefusedError(f"{exc}") from exc
    fields = ("name", "canonical_name", "average_run_time_in_ms", "kernel_sparsity", "kernel_dims")
    return {"rows": [{field: row[field] for field in fields} for row in analysis["layer_info"]]}


def close_session(request):
    """Forget a compiled model."""
    del sessions[request["session"]]
    return {}


class RefusedError(Exception):
    """The engine does not take the model."""

    kind = "refused"


class UnavailableError(Exception):
    """The engine can't be used here."""

    kind = "unavailable"


class ModelInMemory:
    """A path for a model that lies in memory only, so that nothing is left behind by a crash."""

    def __init__(self, data):
        self.data = data

    def __enter__(self):
        self.file = os.fdopen(os.memfd_create("model.onnx"), "wb")
        self.file.write(self.data)
        self.file.flush()
        return f"/proc/self/fd/{self.file.fileno()}"

    def __exit__(self, *error):
        self.file.close()


def cpu_model():
    """The CPU's name as the kernel shows it, or None."""
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:  # noqa: PTH123
        fields = (line.partition(":") for line in file)
        return next((value.strip() for key, _, value in fields if key.strip() == "model name"), None)


def model_of(request):
    """The bytes of the model in a request, with the zeros that it asks for."""
    model = kept[request["model"]]
    if request["zeros"]:
        model = load("random_zeros", "../random_zeros.py").model_with_zeros(model, request["zeros"], request["seed"])
    return model


def decode(document):
    """The array in a request, inline or kept."""
    return loop.decode_array(document, kept)


OPERATIONS = {
    "hello": hello,
    "missing": kept.missing,
    "keep": kept.keep,
    "open": open_session,
    "run": run,
    "seconds": seconds,
    "layers": layers,
    "close": close_session,
}

if __name__ == "__main__":
    # At the end of stdin the parent is gone: end at once, even if busy. Nothing is left behind.
    loop.answer_all(OPERATIONS, at_end=lambda: os._exit(0))
