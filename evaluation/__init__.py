"""Evaluate HEAR modules as in the papers. Run it as `python -m evaluation`; `open_tasks` is a separate command.

    tasks                    HEAR's task folders, the papers' ten tasks, their metrics
    hear_tasks               which of the ten a folder has, and where HEAR publishes the rest
    results                  the results folder: its files, written and read
    driver                   runs hear-eval-kit on all tasks and seeds, in subprocesses
    kit, environment         the subprocess, and the virtual environment that it needs
    aggregate, published.csv means, intervals, the papers' score s(m) and their rows
    papers                   which of the papers' tables and rows a model belongs to
    reproduce                trains and evaluates the rows of a paper's table
    report, tables, page     results as HTML, Markdown and CSV
    probe                    quick comparison of weights on validation clips, without hear-eval-kit
    baselines, hear_naive    HEAR modules to compare with
    peers                    and those of other authors, through the packages that load them
    functionals              another one; needs openSMILE, which is for research only
    open_tasks/              small HEAR tasks from freely licensed recordings

Nothing in `hear_encoders` or `training` imports it.
"""
