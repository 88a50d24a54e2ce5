//! Fuzz target of a guest agent's answers.

use super::{AgentError, receive};

pub fn guest_agent(mut bytes: &[u8]) {
    loop {
        match receive(&mut bytes) {
            Ok(_) => {}
            Err(AgentError::Refused(detail)) => {
                assert!(!detail.chars().any(char::is_control) && detail.chars().count() <= 200);
            }
            Err(_) => return,
        }
    }
}
