"""Tables, figures, conclusions and the HTML report of a study."""
