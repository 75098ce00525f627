"""Actor and critic bodies over [*, A, F] tensors."""
