"""Eight labelled tasks in HEAR's format, made from freely licensed recordings in Debian's packages.

HEAR's own data have to be applied for, downloaded from many places, or paid for. These tasks can be made by anyone
with an internet connection and apt, are modelled on HEAR's, and go through heareval as they are:

    python -m evaluation.open_tasks OUT_DIR

    task               modelled on                        classes, clips      split
    drum_stroke        Mridangam stroke, Beijing opera    8, 724              5 folds by kit maker
    everyday_sounds    ESC-50                             12, 661             4 folds by package
    pitch              NSynth pitch 5h                    48, about 1700      by sound font and instrument
    instrument_family  NSynth families                    10, about 3800      by sound font
    spoken_words       Speech Commands                    84, 335             4 folds by speaker
    speaker_count      LibriCount                         1 to 4, 1800        by voice
    onsets             DCASE 2016 task 2                  8 events, 100       by kit maker and background's author
    language_id        VoxLingua107 top 10                4, 3474             by package; a stress test

What makes recordings of one source alike (its microphone, its room, its codec) says nothing about the label, but a
model that has heard the source finds the label by it: a random split of drum_stroke is 0.83 where this one is 0.65.
So no source is in two splits, and the validation split is cut from the training side by source too. Games copy sounds
from each other: of everyday_sounds those are left out that are also in a package of another fold. The tasks are small:
differences between models want intervals.

    sources    recordings by package and path, decoded
    recorded, rendered, speakers, onsets    the tasks, what they leave to chance, and why
    fluidsynth rendering notes
    folder     a task's folder, in HEAR's format
    __main__   the command

`../tasks` has the lists of recordings with their labels, sources and splits. Every draw has a fixed seed, so that the
same packages make the same bytes. The lists are of Debian 12.
"""
