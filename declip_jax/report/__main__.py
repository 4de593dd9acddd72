from declip_jax.report.cli import main

if __name__ == "__main__":
    main()
