/// A table for people: columns padded, and cut to the width of the terminal where it must be.
pub struct Table {
    columns: Vec<Column>,
    rows: Vec<Vec<String>>,
}

struct Column {
    title: &'static str,
    right: bool,
    /// May be cut short when the terminal is narrow.
    yields: bool,
}

/// Between two columns.
const GAP: usize = 2;
/// No column is cut below this.
const LEAST: usize = 6;

impl Table {
    pub fn new() -> Self {
        Table {
            columns: Vec::new(),
            rows: Vec::new(),
        }
    }

    fn column(mut self, title: &'static str, right: bool, yields: bool) -> Self {
        self.columns.push(Column {
            title,
            right,
            yields,
        });
        self
    }

    /// Text that is always whole.
    pub fn left(self, title: &'static str) -> Self {
        self.column(title, false, false)
    }

    /// Numbers.
    pub fn right(self, title: &'static str) -> Self {
        self.column(title, true, false)
    }

    /// Text that may be cut short with "…".
    pub fn cut(self, title: &'static str) -> Self {
        self.column(title, false, true)
    }

    pub fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.rows.push(
            cells
                .into_iter()
                .map(|cell| cell.replace(['\n', '\t'], " "))
                .collect(),
        );
    }

    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// `width`: columns of the terminal; `None` cuts nothing.
    pub fn render(&self, width: Option<usize>) -> String {
        let mut widths: Vec<usize> = self
            .columns
            .iter()
            .enumerate()
            .map(|(position, column)| {
                self.rows
                    .iter()
                    .filter_map(|row| row.get(position))
                    .map(|cell| cell.chars().count())
                    .chain([column.title.chars().count()])
                    .max()
                    .unwrap_or_default()
            })
            .collect();
        if let Some(width) = width {
            self.fit(&mut widths, width);
        }
        let titles: Vec<String> = self
            .columns
            .iter()
            .map(|column| column.title.to_string())
            .collect();
        let mut text = String::new();
        for row in std::iter::once(&titles).chain(&self.rows) {
            let mut line = String::new();
            for ((cell, column), width) in row.iter().zip(&self.columns).zip(&widths) {
                if !line.is_empty() {
                    line.push_str(&" ".repeat(GAP));
                }
                let cell = shortened(cell, *width);
                let padding = " ".repeat(width.saturating_sub(cell.chars().count()));
                match column.right {
                    true => line.push_str(&(padding + &cell)),
                    false => line.push_str(&(cell + &padding)),
                }
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }

    /// Takes from the widest column that yields, until the line fits or nothing yields any more.
    fn fit(&self, widths: &mut [usize], width: usize) {
        let gaps = GAP * widths.len().saturating_sub(1);
        let mut excess = (widths.iter().sum::<usize>() + gaps).saturating_sub(width);
        while excess > 0 {
            let widest = widths
                .iter_mut()
                .zip(&self.columns)
                .filter(|(_, column)| column.yields)
                .map(|(width, _)| width)
                .max();
            match widest {
                Some(column) if *column > LEAST => *column -= 1,
                _ => return,
            }
            excess -= 1;
        }
    }
}

impl Default for Table {
    fn default() -> Self {
        Table::new()
    }
}

fn shortened(cell: &str, width: usize) -> String {
    if cell.chars().count() <= width {
        return cell.to_string();
    }
    let mut short: String = cell.chars().take(width.saturating_sub(1)).collect();
    short.push('…');
    short
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Table {
        let mut table = Table::new().left("ID").cut("VM").right("SIZE");
        table.row([
            "a1b2".into(),
            "acme/a-rather-long-name-of-a-machine".into(),
            "1.5 GiB".into(),
        ]);
        table.row(["c3".into(), "globex/db".into(), "64 MiB".into()]);
        table
    }

    #[test]
    fn columns_are_padded_and_numbers_stand_right() {
        assert_eq!(
            sample().render(None),
            "ID    VM                                       SIZE\n\
             a1b2  acme/a-rather-long-name-of-a-machine  1.5 GiB\n\
             c3    globex/db                              64 MiB\n"
        );
    }

    #[test]
    fn a_narrow_terminal_cuts_only_what_may_be_cut() {
        let text = sample().render(Some(30));
        assert!(
            text.lines().all(|line| line.chars().count() <= 30),
            "{text}"
        );
        assert!(text.contains("acme/a-rather-…"), "{text}");
        assert!(text.contains("1.5 GiB"), "{text}");
    }

    #[test]
    fn a_terminal_too_narrow_for_anything_still_gets_a_table() {
        let text = sample().render(Some(5));
        assert_eq!(text.lines().count(), 3);
        assert!(text.contains("a1b2"));
    }
}
