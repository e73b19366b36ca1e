"""Files for other engines: 2:4 models for sparse tensor cores, and ONNX."""
