"""Reads the event file of a run with TensorBoard's own reader and prints its scalars and images as JSON. usage: read_events.py RUN"""

import json
import sys

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

events = EventAccumulator(sys.argv[1], size_guidance={"scalars": 0, "images": 0})
events.Reload()
tags = events.Tags()
scalars = {tag: [[event.step, event.value] for event in events.Scalars(tag)] for tag in tags["scalars"]}
images = {tag: [[image.step, image.width, image.height] for image in events.Images(tag)] for tag in tags["images"]}
print(json.dumps({"scalars": scalars, "images": images}))
