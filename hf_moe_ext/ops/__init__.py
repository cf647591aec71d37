"""Pure tensor functions: no module, no state, no knowledge of Transformers or PEFT."""
