//! What a command says of several customers, one after the other.

use super::prune::worse;
use crate::cli::alarms::Concern;
use crate::cli::answer::Answer;
use crate::cli::exit::{Exit, Failure};
use crate::cli::figures;
use crate::cli::invocation::Invocation;
use crate::cli::outside::{Outside, failure_of};
use crate::cli::site::Unopened;
use crate::model::CustomerName;
use jiff::tz::TimeZone;
use serde_json::{Value, json};
use std::fmt::Write;

/// The text, the documents and the worst failure so far.
#[derive(Default)]
pub struct Tally {
    pub text: String,
    pub documents: Vec<Value>,
    pub worst: Option<Failure>,
}

impl Tally {
    pub fn add(&mut self, text: &str, document: Value, failure: Option<Failure>) {
        self.text.push_str(text);
        self.documents.push(document);
        self.meet(failure);
    }

    pub fn meet(&mut self, failure: Option<Failure>) {
        self.worst = worse(self.worst.take(), failure);
    }

    /// One customer's failure is told and never stops the next one's turn; an interruption does.
    pub fn failed(
        &mut self,
        invocation: &Invocation,
        customer: &CustomerName,
        failure: Failure,
    ) -> Result<(), Failure> {
        if failure.exit == Exit::Interrupted {
            return Err(failure);
        }
        let _ = writeln!(self.text, "{customer}: {}", failure.message);
        invocation.terminal.tell(&failure);
        self.documents.push(json!({
            "customer": customer.as_str(),
            "error": failure.document()["error"],
        }));
        self.meet(Some(failure));
        Ok(())
    }

    pub fn all_failed(
        &mut self,
        invocation: &Invocation,
        unopened: Vec<Unopened<'_>>,
    ) -> Result<(), Failure> {
        let mut unopened = unopened.into_iter();
        unopened.try_for_each(|(customer, failure)| self.failed(invocation, customer, failure))
    }

    /// What is in the store beside the customers of the configuration, for which a command does nothing.
    pub fn tell_outside(
        &mut self,
        invocation: &Invocation,
        outside: &Outside,
        zone: &TimeZone,
    ) -> Vec<Value> {
        for concern in &outside.concerns {
            let what = figures::local_times(&concern.alarm.text, zone);
            let _ = writeln!(self.text, "{}: {what}", concern.whom());
            if let Some(mut failure) = failure_of(concern) {
                failure.message = figures::local_times(&failure.message, zone);
                for hint in &failure.hints {
                    let _ = writeln!(self.text, "  hint: {hint}");
                }
                invocation.terminal.tell(&failure);
                self.meet(Some(failure));
            }
        }
        outside.concerns.iter().map(Concern::document).collect()
    }

    /// `document` is given the documents of the customers.
    pub fn answer(self, document: impl FnOnce(Vec<Value>) -> Value) -> Answer {
        let mut answer = Answer::done(self.text, document(self.documents));
        if let Some(failure) = self.worst {
            answer.exit = failure.exit;
        }
        answer
    }
}
