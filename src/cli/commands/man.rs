use crate::cli::answer::Answer;
use crate::cli::args::{Arguments, ManArgs};
use crate::cli::exit::{Exit, Failure};
use clap::CommandFactory;
use serde_json::json;
use std::fs;

pub fn run(args: &ManArgs) -> Result<Answer, Failure> {
    let failed = |error: std::io::Error| {
        let place = args.folder.as_deref().unwrap_or("the page".as_ref());
        Failure::new(
            Exit::Failed,
            format!("writing {}: {error}", place.display()),
        )
    };
    match &args.folder {
        Some(folder) => {
            fs::create_dir_all(folder).map_err(failed)?;
            clap_mangen::generate_to(Arguments::command(), folder).map_err(failed)?;
            let text = format!("manual pages written into {}\n", folder.display());
            Ok(Answer::done(
                text,
                json!({"folder": folder.to_string_lossy()}),
            ))
        }
        None => {
            let mut page = Vec::new();
            clap_mangen::Man::new(Arguments::command())
                .render(&mut page)
                .map_err(failed)?;
            let page = String::from_utf8_lossy(&page).into_owned();
            let document = json!({"page": page});
            Ok(Answer::done(page, document))
        }
    }
}
