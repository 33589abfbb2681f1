"""openv4: DeepSeek-V4's training recipe, reproduced. Start with model/transformer.py and train/loop.py."""
