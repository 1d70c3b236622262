"""Prepare audio for pretraining: folders of audio files, or a free corpus from Debian packages, to shards of log-mel.

prepare       the command: audio files -> shards
plan          which excerpts of which files go into which shard
shards        the shards' format; reading records in any order
workers       worker processes, and how Ctrl-C and SIGTERM end them

debian        the command: 56 hours of music, speech and sounds as shards (debian.csv.gz lists them)
archive       Debian packages: fetched, checked, unpacked, not installed
recordings    recordings in these packages as samples
"""
