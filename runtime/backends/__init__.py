"""What executes the functional step: eager torch, ONNX Runtime, AOTInductor."""

import os

# Official builds of ONNX Runtime for Linux report their use to the maker, from 1.29 and from their import on.  Whatever
# imports it stands below this package, and child processes inherit the variable.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
