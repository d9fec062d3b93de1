"""A teacher's answers to a task source, written as data to train on: shards of prompts through engines that Ray Data keeps busy."""
