"""python scraper/run.py --out data/bulbapedia --contact you@example.org"""

from pokediff.cli import run, scrape

if __name__ == "__main__":
    run(scrape, None, "scraper/run.py")
