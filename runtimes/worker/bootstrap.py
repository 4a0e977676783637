"""The first code of ours that runs on another machine: it unpacks this package there and hands over to it."""


def start(hello):
    """Answer requests until stdin ends, the first of which is `hello`. Every Python 3 can read this function."""
    import base64
    import io
    import os
    import sys
    import tempfile
    import zipfile

    if sys.version_info < (3, 10):  # noqa: UP036
        sys.exit("Python 3.10 or later is needed, this is " + sys.version.split()[0])
    with tempfile.TemporaryDirectory(prefix=f"onnx-spdy-{os.getpid()}-") as folder:
        with zipfile.ZipFile(io.BytesIO(base64.b64decode(hello["package"]))) as package:
            package.extractall(folder)
        sys.path.insert(0, folder)
        from onnx_spdy.runtimes.worker.serve import main

        main(hello, folder)
    os._exit(0)  # the thread that reads stdin may still wait for it
