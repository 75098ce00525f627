"""Pure tensor functions: no TensorDict, no state, no random numbers of their own."""
