"""What a run wrote down of its course."""

import json


def events(outcome, name):
    lines = (outcome.run.path / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == name]
