/// A table for people: columns padded, and cut to the width of the terminal where it must be.
pub struct Table {
    columns: Vec<Column>,
    rows: Vec<Vec<String>>,
}

struct Column {
    title: &'static str,
    right: bool,
    /// How it is cut short when the terminal is narrow, if it may be.
    yields: Option<Cut>,
}

#[derive(Clone, Copy)]
enum Cut {
    /// "the begin…"
    End,
    /// "…the end"
    Start,
    /// "cust…mer/vm": what tells names apart is at both of their ends.
    Name,
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

    fn column(mut self, title: &'static str, right: bool, yields: Option<Cut>) -> Self {
        self.columns.push(Column {
            title,
            right,
            yields,
        });
        self
    }

    /// Text that is always whole.
    pub fn left(self, title: &'static str) -> Self {
        self.column(title, false, None)
    }

    /// Numbers.
    pub fn right(self, title: &'static str) -> Self {
        self.column(title, true, None)
    }

    /// Text that may be cut short with "…".
    pub fn cut(self, title: &'static str) -> Self {
        self.column(title, false, Some(Cut::End))
    }

    /// A name, or "customer/vm", that may be cut short within its parts, the customer's first.
    pub fn name(self, title: &'static str) -> Self {
        self.column(title, false, Some(Cut::Name))
    }

    /// Text of which the end matters most: the ends stand below each other, and the beginning may be cut off.
    pub fn latest(self, title: &'static str) -> Self {
        self.column(title, true, Some(Cut::Start))
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
        let cut = |column: &Column| column.yields.unwrap_or(Cut::End);
        let titles = self.columns.iter().zip(&widths);
        let titles: Vec<String> = titles
            .map(|(column, width)| shortened(column.title, *width, Cut::End))
            .collect();
        let mut text = String::new();
        for row in std::iter::once(&titles).chain(&self.rows) {
            let mut line = String::new();
            for ((cell, column), width) in row.iter().zip(&self.columns).zip(&widths) {
                if !line.is_empty() {
                    line.push_str(&" ".repeat(GAP));
                }
                let cell = shortened(cell, *width, cut(column));
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
                .filter(|(_, column)| column.yields.is_some())
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

fn shortened(cell: &str, width: usize, cut: Cut) -> String {
    let length = cell.chars().count();
    if length <= width {
        return cell.to_string();
    }
    let kept = width.saturating_sub(1);
    match (cut, cell.split_once('/')) {
        (Cut::End, _) => joined(cell, kept, 0),
        (Cut::Start, _) => joined(cell, 0, kept),
        // Names of machines differ at their end.
        (Cut::Name, None) => joined(cell, kept / 2, kept - kept / 2),
        (Cut::Name, Some((customer, vm))) => {
            // Without the stroke between them. A long VM leaves the customer a third.
            let left = kept.saturating_sub(customer.chars().count().min(kept / 3));
            let of_vm = vm.chars().count().min(left);
            let customer = shortened(customer, kept - of_vm, Cut::Name);
            format!("{customer}/{}", shortened(vm, of_vm, Cut::Name))
        }
    }
}

/// The first and the last characters, and that something is missing between them.
fn joined(cell: &str, first: usize, last: usize) -> String {
    let before = cell.chars().take(first);
    let gone = cell.chars().count().saturating_sub(last);
    let after = cell.chars().skip(gone);
    before.chain(['…']).chain(after).collect()
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

    fn fits(text: &str, width: usize) {
        for line in text.lines() {
            assert!(line.chars().count() <= width, "{line}\n{text}");
        }
    }

    #[test]
    fn machines_of_one_customer_keep_names_that_differ() {
        let mut table = Table::new().name("VM").left("REST");
        let rest = "x".repeat(58);
        let names = [
            "a-customer-with-a-long-name/web01",
            "a-customer-with-a-long-name/web02",
            "another-customer-with-a-long-name/web01",
            "a-customer-with-a-long-name/application-server-of-the-shop-01",
            "a-customer-with-a-long-name/application-server-of-the-shop-02",
        ];
        for name in names {
            table.row([name.into(), rest.clone()]);
        }
        let text = table.render(Some(80));
        fits(&text, 80);
        let words = text.split_whitespace();
        let shown: Vec<&str> = words.filter(|one| **one != rest).collect();
        let different: std::collections::BTreeSet<_> = shown.iter().collect();
        assert_eq!(different.len(), shown.len(), "{text}");
        assert!(text.contains("…"), "{text}");
        for end in ["/web01 ", "/web02 ", "op-01 ", "op-02 "] {
            assert!(text.contains(end), "{end} in\n{text}");
        }
    }

    #[test]
    fn of_many_nights_the_last_are_shown() {
        let mut table = Table::new()
            .left("")
            .name("VM")
            .left("LAST")
            .left("KIND")
            .right("POINTS")
            .latest("NIGHTS")
            .left("EXPIRY");
        table.row([
            "X".into(),
            "bakery-jansen-and-sons/web01".into(),
            "2026-11-07 03:12".into(),
            "incr".into(),
            "37".into(),
            format!("{}?X", "#".repeat(33)),
            "2026-12-07".into(),
        ]);
        let text = table.render(Some(80));
        fits(&text, 80);
        assert!(text.contains(" …####"), "{text}");
        assert!(text.contains("##?X  2026-12-07\n"), "{text}");
        assert!(text.contains("/web01 "), "{text}");
    }

    #[test]
    fn the_newest_nights_of_strips_of_different_lengths_stand_below_each_other() {
        let mut table = Table::new().left("VM").latest("NIGHTS").left("EXPIRY");
        table.row(["web01".into(), "#######?".into(), "2026-12-07".into()]);
        table.row(["db01".into(), "#X".into(), "2026-12-08".into()]);
        assert_eq!(
            table.render(None),
            "VM       NIGHTS  EXPIRY\n\
             web01  #######?  2026-12-07\n\
             db01         #X  2026-12-08\n"
        );
    }

    #[test]
    fn a_name_alone_is_cut_in_its_middle() {
        assert_eq!(shortened("bakery-jansen", 9, Cut::Name), "bake…nsen");
        assert_eq!(shortened("bakery-jansen", 13, Cut::Name), "bakery-jansen");
        assert_eq!(shortened("bakery/web01", 9, Cut::Name), "b…y/web01");
        assert_eq!(shortened("bakery/web01", 6, Cut::Name), "…/w…01");
    }

    #[test]
    fn a_terminal_too_narrow_for_anything_still_gets_a_table() {
        let text = sample().render(Some(5));
        assert_eq!(text.lines().count(), 3);
        assert!(text.contains("a1b2"));
    }
}
