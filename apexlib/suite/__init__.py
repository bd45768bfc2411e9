"""What runs, records and draws: profiles, runner, trials, experiments, figures, the ledger of claims."""
