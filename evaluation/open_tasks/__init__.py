"""Eight labeled tasks in HEAR's format, made from freely licensed recordings in Debian's packages.

HEAR's own data must be applied for, downloaded from many places, or paid for. These tasks are modeled on HEAR's,
anyone with an internet connection and apt can make them, and heareval runs them unchanged:

    python -m evaluation.open_tasks OUT_DIR

    task               modeled on                        classes, clips      split
    drum_stroke        Mridangam stroke, Beijing opera    8, 724              5 folds by kit maker
    everyday_sounds    ESC-50                             12, 661             4 folds by package
    pitch              NSynth pitch 5h                    48, about 1700      by sound font and instrument
    instrument_family  NSynth families                    10, about 3800      by sound font
    spoken_words       Speech Commands                    84, 335             4 folds by speaker
    speaker_count      LibriCount                         1 to 4, 1800        by voice
    onsets             DCASE 2016 task 2                  8 events, 100       by kit maker and background's author
    language_id        VoxLingua107 top 10                4, 3474             by package; a stress test

No source is in two splits, and the validation split is cut from the training side by source too. Recordings of one
source share a microphone, a room and a codec, from which a model could guess the label: with a random split,
drum_stroke scores 0.83, with this one 0.65. Games also copy sounds from each other, so everyday_sounds leaves out
sounds that a package of another fold has too. The tasks are small: compare models by confidence intervals.

    sources    lists of recordings; clips of one length and level
    recorded, rendered, speakers, onsets    the tasks, and the reasons for their design
    fluidsynth rendering notes
    folder     a task's folder in HEAR's format
    __main__   the command

`lists/` names the recordings with their labels, sources and splits, for Debian 12. Every random draw has a fixed seed,
so the same packages give the same bytes.
"""
