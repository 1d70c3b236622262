"""The papers' evaluation: HEAR tasks and open tasks with hear-eval-kit, and a report of it."""
