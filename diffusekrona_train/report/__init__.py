"""Pages, charts and contact sheets; knows neither runs nor metrics."""
