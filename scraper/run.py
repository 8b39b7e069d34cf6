"""python scraper/run.py --out data/bulbapedia --contact you@example.org"""

from pokediff.cli import main

if __name__ == "__main__":
    main(command="scrape", prog="scraper/run.py")
