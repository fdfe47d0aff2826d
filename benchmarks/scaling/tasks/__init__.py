"""What scale_tasks.py runs: each prints what it found as lines `RESULT {json}`."""
