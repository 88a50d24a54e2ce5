use super::selection;
use crate::cli::answer::Answer;
use crate::cli::args::TrackingCommand;
use crate::cli::exit::Failure;
use crate::cli::invocation::Invocation;
use crate::cli::site::Site;
use crate::jobs::release_tracking;
use serde_json::json;
use std::fmt::Write;

pub fn run(invocation: &Invocation, command: &TrackingCommand) -> Result<Answer, Failure> {
    let TrackingCommand::Release(args) = command;
    let site = Site::open(invocation)?;
    let mut text = String::new();
    let mut documents = Vec::new();
    for selector in &args.vms {
        let (config, vm) = selection::configured(&site.config, selector)?;
        let open = site.customer(config)?;
        let released = release_tracking(&open.customer, &site.host, &site.task(&open, vm)?)?;
        let name = format!("{}/{}", config.name, vm.name);
        if released.is_empty() {
            let _ = writeln!(text, "{name}: nothing was tracked");
        }
        for what in &released {
            let _ = writeln!(text, "{name}: released {what}");
        }
        documents.push(json!({
            "customer": config.name.as_str(),
            "vm": vm.name.as_str(),
            "released": released,
        }));
    }
    Ok(Answer::done(text, json!({ "vms": documents })))
}
