"""Work on any ONNX graph: fold its constants, find the layer of a node."""
