"""What executes the functional step: eager torch, ONNX Runtime, AOTInductor."""
