"""The operations of the model, one per file: plain reference, fast path, one public function."""
