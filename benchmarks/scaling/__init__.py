"""The parts of scale.py and of scale_tasks.py, by what they measure."""
