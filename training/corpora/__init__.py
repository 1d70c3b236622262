"""Prepare audio for pretraining: folders of audio files, or a free corpus from Debian packages, to shards of log-mel.

prepare       the command: audio files -> shards
plan          assigns excerpts of audio files to shards
shards        the shards' format; reading records in any order
pack          the command: shards -> a pack of a fifteenth of their size
workers       worker processes, ended by Ctrl-C and SIGTERM

debian        the command: 56 hours of music, speech and sounds as shards (debian.csv.gz lists them)
archive       Debian packages: fetched, checked, unpacked, not installed
recordings    recordings in these packages as samples
"""
