//! The `wasm-operator` program.

use std::process::ExitCode;

use clap::Parser;
use wasm_operator::cli::{Cli, Command, RunOptions};
use wasm_operator::{build_go, build_rust, check, compile, logging, operator};

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Some(Command::CompileModule { code, image }) = cli.command {
        // Its standard error is a message to the parent, and nothing else.
        return match compile::serve(&compile::Output { code, image }) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("{error}");
                ExitCode::FAILURE
            }
        };
    }
    logging::start();
    match (cli.command, cli.run) {
        (Some(Command::Predictor { listen }), _) => {
            finish(async_std::task::block_on(operator::predictor(listen)))
        }
        (Some(Command::Compile { directory, cache }), _) => finish(async_std::task::block_on(
            operator::compile(directory, cache),
        )),
        (Some(Command::BuildGo(options)), _) => built(&build_go::build(&options)),
        (Some(Command::BuildRust(options)), _) => built(&build_rust::build(&options)),
        (Some(Command::Check { directory }), _) => report(&check::check(&directory)),
        (Some(Command::Run(options)), _) => run(*options),
        (None, Some(options)) => run(options),
        (Some(Command::CompileModule { .. }), _) | (None, None) => ExitCode::from(2),
    }
}

fn run(options: RunOptions) -> ExitCode {
    // kube's credential plug-ins want a tokio runtime around them. With this one entered, async-std
    // lends it to all its threads and starts none of tokio's.
    let tokio = match tokio::runtime::Builder::new_current_thread().build() {
        Ok(tokio) => tokio,
        Err(error) => return fail(&error),
    };
    let _entered = tokio.enter();
    operator::prepare(&options);
    finish(async_std::task::block_on(operator::run(options)))
}

fn finish<E: std::error::Error>(result: Result<(), E>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error),
    }
}

/// A tool's messages are for a person who waits, and no log.
fn built<E: std::error::Error>(result: &Result<(), E>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("wasm-operator: {error}");
            ExitCode::FAILURE
        }
    }
}

fn report(report: &check::Report) -> ExitCode {
    for problem in &report.problems {
        eprintln!("{problem}");
    }
    let (good, bad) = (report.good, report.problems.len());
    println!(
        "{good} {} in order, {bad} {}",
        plural(good, "child", "children"),
        plural(bad, "problem", "problems")
    );
    if bad == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn plural<'a>(count: usize, one: &'a str, many: &'a str) -> &'a str {
    if count == 1 { one } else { many }
}

fn fail(error: &dyn std::error::Error) -> ExitCode {
    log::error!("{error}");
    ExitCode::FAILURE
}
